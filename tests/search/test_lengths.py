"""How long trials are, where they are scored on the way, and rough speeds for plans."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.search.lengths import (
    choose_max_steps,
    guess_parameters,
    guess_seconds_per_step,
    next_rung,
    plan_rungs,
)


@pytest.mark.parametrize(
    ("config", "count"), [({"dtype": "bfloat16"}, 2000), ({"torch_dtype": "float16"}, 2000), ({}, 1000)]
)
def test_a_folders_parameters_are_guessed_from_its_weight_files(
    config: dict[str, str], count: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(3000))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(1000))
    # The same weights in another form, and what transformers does not load.
    for name in ("pytorch_model.bin", "consolidated.safetensors", "training.bin"):
        (tmp_path / name).write_bytes(bytes(5000))
    assert guess_parameters(str(tmp_path)) == count


@pytest.mark.parametrize("text", [None, "[]", "{"])
def test_what_cannot_be_guessed_is_taken_for_a_common_size(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert guess_parameters(str(tmp_path)) == guess_parameters("some/model") == 100_000_000


def test_no_step_is_free() -> None:
    assert guess_seconds_per_step(100, None, 1, None) == 0.02


def test_the_next_rung_is_the_first_not_reached() -> None:
    assert [next_rung(step, (40, 80, 160)) for step in (0, 40, 41, 80)] == [40, 80, 80, 160]


@pytest.mark.parametrize(
    ("max_steps", "rungs"),
    [
        (1, (1,)),
        (79, (79,)),
        (80, (40, 80)),
        (160, (40, 80, 160)),
        (320, (40, 80, 160, 320)),
        (1280, (160, 320, 640, 1280)),
        (1001, (125, 250, 500, 1001)),
    ],
)
def test_rungs_halve_the_length_down_to_forty_steps_and_are_at_most_four(
    max_steps: int, rungs: tuple[int, ...]
) -> None:
    assert plan_rungs(max_steps) == rungs


workers = st.integers(1, 64)


@given(st.floats(1.0, 1e7), workers, st.floats(1.0, 10.0), st.floats(0.005, 5.0))
def test_more_time_never_makes_trials_shorter(seconds: float, count: int, times: float, per_step: float) -> None:
    assert choose_max_steps(seconds, count, per_step, None) <= choose_max_steps(seconds * times, count, per_step, None)


@given(st.floats(1.0, 1e7), workers, st.floats(0.005, 5.0), st.floats(1.0, 10.0))
def test_slower_steps_never_make_trials_longer(seconds: float, count: int, per_step: float, times: float) -> None:
    assert choose_max_steps(seconds, count, per_step, None) >= choose_max_steps(seconds, count, per_step * times, None)


@given(st.floats(1.0, 1e7), workers, st.floats(0.005, 5.0))
def test_more_workers_never_make_trials_shorter_nor_as_long_as_what_is_kept_for_their_confirmation(
    seconds: float, count: int, per_step: float
) -> None:
    steps = choose_max_steps(seconds, count, per_step, None)
    assert choose_max_steps(seconds, 1, per_step, None) <= steps
    # A quarter of the wall time, in which a training is as long whatever the others do.
    assert steps <= 160 or 2 * steps * per_step <= 0.25 * seconds


def test_all_the_time_there_is_buys_no_more_than_without_a_clock_and_some_buys_several_trials() -> None:
    unbounded = choose_max_steps(math.inf, 1, 0.1, None)
    assert choose_max_steps(1e12, 1, 0.1, None) >= unbounded > 0
    hour = choose_max_steps(3600.0, 1, 0.1, None)
    # Of 36,000 steps of a tenth of a second: enough full lengths to compare.
    assert 5 * hour <= 36_000
