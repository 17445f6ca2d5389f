"""What stands in for parts of peft is gone when the context ends, however it ends."""

from __future__ import annotations

import pytest

from autopeft.backends.hf.peft_stand_ins import replacing


class Owner:
    @staticmethod
    def count() -> int:
        return 1

    def name(self) -> str:
        return "own"


def fail_with_others_in_place() -> None:
    with replacing((Owner, "count", lambda self: 2), (Owner, "name", lambda self: "other")):
        assert (Owner().count(), Owner().name()) == (2, "other")
        raise RuntimeError


def test_what_stood_there_comes_back_as_it_was_after_a_failure() -> None:
    before = dict(vars(Owner))
    with pytest.raises(RuntimeError):
        fail_with_others_in_place()
    assert dict(vars(Owner)) == before
    assert (Owner().count(), Owner().name()) == (1, "own")


def test_a_name_that_an_owner_no_longer_defines_is_told_before_anything_is_replaced() -> None:
    with pytest.raises(KeyError, match="gone"), replacing((Owner, "name", None), (Owner, "gone", None)):
        pass
    assert Owner().name() == "own"
