"""The exception tree: what it tells a user, a shell and a pipe."""

from __future__ import annotations

import inspect
import pickle

import pytest

from autopeft import errors
from autopeft.errors import AutopeftError, NothingFeasibleError, UsageError, WorkerError, suggest_nearest

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, AutopeftError)]


@pytest.mark.parametrize("cls", ALL)
def test_every_error_survives_a_pipe(cls: type[AutopeftError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("a rule, what was given, what to do")))
    assert type(copy) is cls
    assert str(copy) == "a rule, what was given, what to do"


@pytest.mark.parametrize("cls", [cls for cls in ALL if issubclass(cls, UsageError)])
def test_what_the_user_can_mend_exits_with_2(cls: type[AutopeftError]) -> None:
    assert cls.exit_code == 2


def test_other_exit_codes_are_as_documented() -> None:
    assert (AutopeftError.exit_code, WorkerError.exit_code, NothingFeasibleError.exit_code) == (1, 1, 3)


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls is not AutopeftError])
def test_every_error_refines_one_of_the_standard_library(cls: type[AutopeftError]) -> None:
    assert issubclass(cls, ValueError | RuntimeError)


def test_every_error_stands_in_the_drawing() -> None:
    assert [cls.__name__ for cls in ALL if cls.__name__ not in (errors.__doc__ or "")] == []


def test_a_typo_gets_the_nearest_name() -> None:
    assert suggest_nearest("lroa", ["lora", "ia3"]) == "Did you mean 'lora'? Known: ia3, lora."


def test_the_nearest_name_does_not_depend_on_case() -> None:
    assert suggest_nearest("LoRA", ["lora", "ia3"]).startswith("Did you mean 'lora'?")


def test_a_name_far_from_all_gets_the_known_ones() -> None:
    assert suggest_nearest("xyzzy", ["lora", "ia3"]) == "Known: ia3, lora."
