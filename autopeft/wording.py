"""Small words that every layer needs."""

from __future__ import annotations


def say_count(number: int, noun: str, many: str | None = None) -> str:
    """`1 trial`, `3 trials`, `12,000 entries`; `many` is the plural where it is no `s` at the end."""
    return f"{number:,} {noun if number == 1 else many or f'{noun}s'}"


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """Of what a library says, which may go on for pages; empty where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")


def last_line(text: str) -> str:
    """Of a traceback or a log, where it says most; empty where it says nothing."""
    return next(reversed(text.strip().splitlines()), "")
