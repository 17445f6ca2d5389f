"""Safe names for files, and files and folders that nobody sees half written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from autopeft.errors import ExportError


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


def check_new_folder(out: Path) -> None:
    """Raises ExportError where something is already there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"--out must be a new or empty folder, but '{out}' is not. Nothing was overwritten.")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place once everything in it is right, and is gone otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as exc:
        raise ExportError(f"--out must be writable, but '{out}' is not: {exc.strerror}.") from exc
    try:
        yield part
        if out.exists():
            out.rmdir()
        # Temporary folders are their owner's alone.
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
