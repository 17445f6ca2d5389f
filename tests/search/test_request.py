"""A user's own configurations, beside what is fixed for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import SpecError
from autopeft.search.request import read_included


@pytest.fixture
def include(tmp_path: Path) -> Any:
    def read(text: str, **fixed: Any) -> Any:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        named = {key.replace("__", "."): value for key, value in fixed.items()}
        return read_included(path, device_kind="cpu", max_steps=80, seed=0, fixed=named)

    return read


def test_what_a_file_leaves_open_is_as_it_was_fixed(include: Any) -> None:
    assert include("method: lora").bits == 32
    assert include("method: lora", bits=4).bits == 4
    assert include("method: lora", batch_size=8, lora__rank=3).batch_size == 8
    assert include("method: lora", batch_size=8, lora__rank=3).settings["rank"] == 3


def test_a_methods_own_value_goes_before_that_for_all(include: Any) -> None:
    assert include("method: lora\nbits: 8", bits=4, lora__bits=8).bits == 8
    assert include("method: lora", lora__bits=8, bits=4).bits == 8


def test_what_is_fixed_for_others_does_not_touch_it(include: Any) -> None:
    # IA3 has no rank, and LoRA's is not DeLoRA's.
    assert include("method: ia3", rank=3).method == "ia3"
    assert include("method: delora\nrank: 5", lora__rank=3).settings["rank"] == 5


@pytest.mark.parametrize(("own", "fixed"), [("8", 8), ("unquantized", 32), ("32", "unquantized")])
def test_a_file_may_say_what_is_fixed(own: str, fixed: Any, include: Any) -> None:
    assert include(f"method: lora\nbits: {own}", bits=fixed).bits in (8, 32)


def test_a_file_may_not_say_otherwise(include: Any) -> None:
    with pytest.raises(SpecError, match=r"sets learning_rate to 0.001, but --fix learning_rate=0.01"):
        include("method: lora\nlearning_rate: 1e-3", learning_rate=0.01)
    with pytest.raises(SpecError, match="sets rank to"):
        include("method: lora\nrank: [1, 2]", lora__rank=3)
