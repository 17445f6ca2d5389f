"""Safe names for files, and files and folders that nobody sees half written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from autopeft.errors import ExportError, RecordError
from autopeft.locks import lock_file


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


@contextlib.contextmanager
def hold_lock(path: Path, *, patience_seconds: float = 60.0) -> Iterator[None]:
    """Holds the lock file `path` against every other process, waiting until it is free, and removes it afterwards.

    A process that ends, however it does, lets go of it. Raises RecordError where it is not free in time, and where the
    file system has no locks.
    """
    end = time.monotonic() + patience_seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    while (file := _try_lock(path)) is None:
        if time.monotonic() >= end:
            raise RecordError(
                f"One process at a time may write to '{path.parent}', and another one has held {path.name} there for "
                f"{patience_seconds:g} seconds. Nothing was changed. Wait for it or stop it, then run this again."
            )
        time.sleep(0.05)
    with file:
        try:
            yield
        finally:
            # While it is still held: whoever opened it meanwhile sees that it is gone, and makes a new one. Windows
            # removes no open file; there it stays, and is free.
            with contextlib.suppress(PermissionError):
                path.unlink(missing_ok=True)


def _try_lock(path: Path) -> BinaryIO | None:
    """The open file, which holds the lock until it is closed; None where another process holds it."""
    file = path.open("ab")
    try:
        lock_file(file.fileno())
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as exc:
        file.close()
        raise RecordError(
            f"'{path.parent}' must lie on a file system with file locks, so that two processes cannot lose each "
            f"other's results, but {path.name} cannot be locked: {exc.strerror}. Nothing was changed. Run this in a "
            "folder on a local disk."
        ) from exc
    file.close()
    return None


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
