"""Numbers and their nouns, and errors in a line."""

from __future__ import annotations

from autopeft.wording import first_line, in_one_line, last_line, say_count


def test_one_is_singular_and_everything_else_is_not() -> None:
    assert [say_count(number, "seed") for number in (0, 1, 2, 1200)] == ["0 seeds", "1 seed", "2 seeds", "1,200 seeds"]


def test_a_plural_of_its_own_is_taken_whole() -> None:
    assert [say_count(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]


def test_errors_are_told_in_a_line() -> None:
    error = ValueError("\nfirst of\n  two lines")
    assert (first_line(error), in_one_line(error)) == ("first of", "first of two lines")
    assert first_line(ValueError()) == ""


def test_the_end_of_a_log_is_told() -> None:
    assert last_line("Traceback:\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert last_line("\n") == ""
