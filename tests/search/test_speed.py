"""Predicted seconds: what they leave out, and what a resumed study makes of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from autopeft.records import RungScore, Segment, TrialSpec
from autopeft.search.speed import Kind, Speed, kind_of
from autopeft.search.store import Trial

LORA = Kind("lora", 32, 16)


def make_trial(spec: TrialSpec, number: int, ended_at: float, seconds: float, **loading: float) -> Trial:
    """40 steps of half a second, and what else its stretch took."""
    score = RungScore(
        rung=0, step=40, quality=0.5, loss=0.7, num_examples=100, device_seconds=seconds, train_seconds=20.0,
        scores_file="x", scores_digest="x",
    )  # fmt: skip
    segment = Segment(
        worker=0, trial=number, purpose="search", start_seconds=ended_at - seconds, end_seconds=ended_at, step=40,
        **loading,
    )  # fmt: skip
    return Trial(number=number, spec=spec, source="sampler", rungs=[score], segments=[segment])


def test_loading_after_a_workers_death_is_no_scoring(make_spec: Callable[..., TrialSpec]) -> None:
    speed = Speed()
    speed.learn_all([make_trial(make_spec(), 0, 100.0, 82.0, loading_seconds=60.0)])
    assert speed.predict(LORA, 40) == pytest.approx(20.0 + 2.0)


def test_a_second_pass_costs_what_the_cheapest_stretch_had_beside_training(make_spec: Callable[..., TrialSpec]) -> None:
    speed = Speed()
    speed.learn_all([make_trial(make_spec(), 0, 100.0, 23.0), make_trial(make_spec(), 1, 200.0, 50.0)])
    assert speed.predict(LORA, 40) == pytest.approx(20.0 + 30.0)
    assert speed.predict(LORA, 40, passes=3.0) == pytest.approx(20.0 + 30.0 + 2 * 3.0)


def test_the_last_stretches_are_those_that_ended_last(make_spec: Callable[..., TrialSpec]) -> None:
    slow = make_trial(make_spec(), 0, 5000.0, 120.0)
    quick = [make_trial(make_spec(), number, 100.0 * number, 22.0) for number in range(1, 30)]
    speed = Speed()
    speed.learn_all([slow, *quick])
    assert speed.predict(LORA, 0) == pytest.approx(100.0)


def test_loading_is_foreseen_where_a_worker_holds_another_base(make_spec: Callable[..., TrialSpec]) -> None:
    speed = Speed()
    assert speed.predict_load(4, 16) == 0.0
    speed.learn_all(
        [
            make_trial(make_spec(bits=bits), number, 100.0 * number, 22.0 + seconds, base_seconds=seconds)
            for number, (bits, seconds) in enumerate([(4, 60.0), (4, 80.0), (8, 20.0), (16, 0.0)])
        ]
    )
    assert speed.predict_load(4, 16) == 70.0
    assert speed.predict(LORA, 40) == pytest.approx(20.0 + 2.0)
    # Nothing is known of its own.
    assert speed.predict_load(16, 4) == 60.0
    assert speed.predict_load(4, 4) == speed.predict_load(4, None) == 0.0


def test_a_step_takes_what_its_kind_took_and_as_much_an_example_where_that_is_unknown(
    make_spec: Callable[..., TrialSpec],
) -> None:
    speed = Speed()
    for seconds, spec in (
        (20.0, make_spec()),
        (30.0, make_spec(batch_size=32)),
        (80.0, make_spec(bits=4)),
        (160.0, make_spec("ia3")),
    ):
        score = dataclasses.replace(make_trial(spec, 0, 0.0, 0.0).rungs[0], train_seconds=seconds)
        speed.learn(spec, score, 40, seconds)

    def pace(spec: TrialSpec, **settings: Any) -> float:
        return speed.predict(kind_of(spec), 40, **settings)

    assert pace(make_spec()) == pytest.approx(20.0)
    assert pace(make_spec(batch_size=32)) == pytest.approx(30.0)
    assert pace(make_spec(bits=4)) == pytest.approx(80.0)
    # Never timed: as the slowest of its method; in the middle of them where that is asked for.
    assert pace(make_spec(bits=8)) == pytest.approx(80.0)
    assert pace(make_spec(batch_size=64)) == pytest.approx(4 * 80.0)
    assert pace(make_spec(batch_size=64), unseen=statistics.median) == pytest.approx(4 * 20.0)
    assert pace(make_spec("vera")) == pytest.approx(160.0)
    # A step has a part that no batch shortens.
    assert pace(make_spec("vera", batch_size=8)) == pytest.approx(160.0)
