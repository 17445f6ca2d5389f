"""How long trials are, and where they are scored on the way."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.search.lengths import choose_max_steps, next_rung, plan_rungs


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


def test_the_next_rung_lies_beyond_the_step() -> None:
    assert [next_rung(step, (40, 80, 160)) for step in (0, 39, 40, 80)] == [40, 40, 80, 160]


@given(st.floats(1.0, 1e7), st.floats(1.0, 10.0), st.floats(0.005, 5.0))
def test_more_time_never_makes_trials_shorter(seconds: float, times: float, per_step: float) -> None:
    assert choose_max_steps(seconds, per_step, None) <= choose_max_steps(seconds * times, per_step, None)


@given(st.floats(1.0, 1e7), st.floats(0.005, 5.0), st.floats(1.0, 10.0))
def test_slower_steps_never_make_trials_longer(seconds: float, per_step: float, times: float) -> None:
    assert choose_max_steps(seconds, per_step, None) >= choose_max_steps(seconds, per_step * times, None)


def test_all_the_time_there_is_buys_no_more_than_without_a_clock_and_some_buys_several_trials() -> None:
    unbounded = choose_max_steps(math.inf, 0.1, None)
    assert choose_max_steps(1e12, 0.1, None) >= unbounded > 0
    hour = choose_max_steps(3600.0, 0.1, None)
    # Of 36,000 steps of a tenth of a second: enough full lengths to compare.
    assert 5 * hour <= 36_000
