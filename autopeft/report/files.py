"""Safe names for files, and files that nobody sees half written."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path


def safe_file_name(name: str) -> str:
    """One path component for any text: `org/model` -> `org--model`; it can neither escape its folder nor hide in it.

    Names that lose characters in it carry a digest, so that two models never share a leaderboard by accident.
    """
    plain = name.replace("/", "--").replace(":", "-")
    safe = re.sub(r"[^\w.+=-]", "_", plain, flags=re.ASCII).lstrip(".-")[:100]
    if safe and safe == plain:
        return safe
    return f"{safe or 'unnamed'}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def write_atomically(path: Path, text: str) -> None:
    """Writes beside `path`, then renames, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
