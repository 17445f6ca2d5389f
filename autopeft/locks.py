"""Locks on open files, against other processes; whoever ends, however that comes about, lets go of them."""

from __future__ import annotations

import errno
import importlib
import os


def lock_file(descriptor: int) -> None:
    """Locks the whole file until it is closed.

    Raises BlockingIOError where another process holds it, and another OSError where the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        _lock_on_windows(descriptor)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_on_windows(descriptor: int) -> None:
    # By name, because type checkers elsewhere know nothing of it.
    msvcrt = importlib.import_module("msvcrt")
    # It locks bytes from the current position on; the first stands for all, even of an empty file.
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(exc.errno, "held by another process") from exc
        raise
