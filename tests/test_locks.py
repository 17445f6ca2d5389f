"""A lock on a file, on either kind of system."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from autopeft.locks import lock_file


def test_a_file_is_held_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as first, path.open("ab") as second:
        lock_file(first.fileno())
        with pytest.raises(BlockingIOError):
            lock_file(second.fileno())
        first.close()
        lock_file(second.fileno())


def without_fcntl(monkeypatch: pytest.MonkeyPatch, error: int | None) -> list[tuple[int, int, int]]:
    """Windows' module in its place: what was asked of it, as (position, mode, bytes)."""
    asked = []

    def locking(descriptor: int, mode: int, count: int) -> None:
        asked.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if error is not None:
            raise OSError(error, os.strerror(error))

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))  # type: ignore[arg-type]
    return asked


def test_without_posix_the_first_byte_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = without_fcntl(monkeypatch, None)
    with (tmp_path / "lock").open("a+") as file:
        file.write("something")
        file.flush()
        lock_file(file.fileno())
    assert asked == [(0, 2, 1)]


@pytest.mark.parametrize(
    ("error", "words"),
    [(errno.EACCES, "held by another"), (errno.EDEADLK, "held by another"), (errno.EINVAL, "Invalid argument")],
)
def test_what_another_holds_is_told_from_what_cannot_be_locked(
    error: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_fcntl(monkeypatch, error)
    with (tmp_path / "lock").open("ab") as file, pytest.raises(OSError, match=words) as caught:
        lock_file(file.fileno())
    assert isinstance(caught.value, BlockingIOError) == (error != errno.EINVAL)
