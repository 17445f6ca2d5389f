"""Recordings played back: what was recorded is what is answered, and a study on them is a study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autopeft.backends.base import Ended, Finished, Pack, Stretch
from autopeft.backends.replay import (
    Curve,
    Curves,
    Recording,
    ReplayBackend,
    ReplayCostModel,
    even_pace,
    join_recordings,
    read_recording,
    write_recording,
)
from autopeft.errors import SpecError
from autopeft.executors.inline import InlineExecutor
from autopeft.records import Cost, Failed, Provenance, RungScore, StudyConfig, TrialSpec

MakeSpec = Callable[..., TrialSpec]
NUM_EXAMPLES = 6
RATE = 2.0
"""Two threads a worker: device-seconds a second."""


def make_curve(spec: TrialSpec, steps: tuple[int, ...], *, failed: Failed | None = None) -> Curve:
    """A tenth of a second a step, and a second of scoring."""
    rungs = []
    before = 0
    for rung, step in enumerate(steps):
        seconds = (step - before) / 10
        rungs.append(
            RungScore(
                rung=rung, step=step, quality=0.5 + rung / 10, loss=1.0 - rung / 10, num_examples=NUM_EXAMPLES,
                device_seconds=(seconds + 1.0) * RATE, train_seconds=seconds, scores_file="x", scores_digest="x",
            )
        )  # fmt: skip
        before = step
    cost = Cost(trainable_parameters=8, head_parameters=1, peak_vram_bytes=100, vram_source="estimated")
    return Curve(spec=spec, cost=cost, rungs=tuple(rungs), failed=failed, lost_seconds=7.0 if failed else 0.0)


@pytest.fixture(scope="module")
def recording(make_spec: MakeSpec) -> Recording:
    """One curve at full length, one that diverged after the first rung."""
    config = StudyConfig(
        name="x", task="name: demo", task_name="demo", model="minilm", budget="2trials", objectives=("quality", "vram"),
        rungs=(40, 80, 160), seed=0, workers=1, device_kind="cpu", space="", space_name="small", methods=None, fixed={},
        included=(), max_vram_bytes=None, confirm_share=0.0, confirm_seeds=0, until=None, price_per_device_hour=None,
        majority_quality=0.5, majority_test_quality=0.5, scorer="accuracy",
    )  # fmt: skip
    provenance = Provenance(
        autopeft="0", python="3", packages={}, platform="x", device="x", device_count=1, threads=2, model_digest="m",
        task_digest="t", num_train=1, num_validation=NUM_EXAMPLES, num_test=1, created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    diverged = Failed(reason="diverged", detail="nan")
    curves = (
        make_curve(make_spec(), (40, 80, 160)),
        make_curve(make_spec(settings={"rank": 3}), (40,), failed=diverged),
    )
    losses = np.arange(2 * 3 * NUM_EXAMPLES, dtype=np.float16).reshape(6, NUM_EXAMPLES)
    return Recording(
        curves=Curves(
            config=config, provenance=provenance, reference={"quality": 0.5, "vram": 200.0}, device_rate=RATE,
            wall_seconds=(1.0,), machine={}, curves=curves,
        ),
        losses=losses,
        predictions=losses.astype(np.int16),
        labels=np.zeros(NUM_EXAMPLES, dtype=np.int64),
    )  # fmt: skip


def ask(recording: Recording, curve: int, from_step: int, to_step: int) -> Finished | Ended:
    stretch = Stretch(job=1, trial=0, spec=recording.curves.curves[curve].spec, purpose="search",
                      from_step=from_step, to_step=to_step)  # fmt: skip
    return ReplayBackend(recording).run(stretch, lambda _: None)


def test_a_stretch_scores_and_takes_what_was_recorded(recording: Recording) -> None:
    finished = ask(recording, 0, 40, 80)
    assert isinstance(finished, Finished)
    assert (finished.validation.quality, finished.validation.loss) == (0.6, 0.9)
    # 40 steps of a tenth and a second of scoring, on two threads.
    assert finished.simulated_seconds == pytest.approx(10.0)


def test_a_rung_that_is_passed_over_costs_its_steps_and_not_its_scoring(recording: Recording) -> None:
    finished = ask(recording, 0, 0, 160)
    assert isinstance(finished, Finished)
    assert finished.simulated_seconds == pytest.approx(2 * (16 + 1))


def test_a_failure_comes_when_it_came_and_takes_what_it_took(recording: Recording) -> None:
    assert isinstance(ask(recording, 1, 0, 40), Finished)
    ended = ask(recording, 1, 40, 80)
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.simulated_seconds) == ("diverged", 7.0)


def test_per_example_losses_are_those_of_the_curve_and_the_rung(recording: Recording) -> None:
    backend = ReplayBackend(recording)
    finished = ask(recording, 0, 40, 80)
    assert isinstance(finished, Finished)
    assert recording.losses is not None
    np.testing.assert_array_equal(backend.read_scores(finished.scores_file, "validation_losses"), recording.losses[1])


def test_a_recording_of_means_alone_has_no_per_example_losses(recording: Recording) -> None:
    backend = ReplayBackend(replace(recording, losses=None, predictions=None))
    finished = ask(recording, 0, 40, 80)
    assert isinstance(finished, Finished)
    assert backend.read_scores(finished.scores_file, "validation_losses") is None


def test_costs_are_the_recorded_ones_and_nothing_else_is_known(recording: Recording, make_spec: MakeSpec) -> None:
    costs = ReplayCostModel(recording)
    assert costs.cost(recording.curves.curves[0].spec) == recording.curves.curves[0].cost
    with pytest.raises(SpecError, match="was not recorded"):
        costs.cost(make_spec("ia3"))


def test_the_inline_executors_clock_runs_at_the_recorded_rate(recording: Recording) -> None:
    executor = InlineExecutor(
        None, 1, backend=ReplayBackend(recording), costs=ReplayCostModel(recording), device_rate=RATE
    )
    stretch = Stretch(job=1, trial=0, spec=recording.curves.curves[0].spec, purpose="search", from_step=0, to_step=40)
    executor.assign(0, Pack(stretches=(stretch,)))
    (event,) = executor.wait(100.0)
    assert event.at_seconds == executor.now() == pytest.approx(5.0)


def test_a_recording_reads_back_as_it_was_written(recording: Recording, tmp_path: Path) -> None:
    write_recording(recording, tmp_path / "a.npz")
    read = read_recording(tmp_path / "a.npz")
    assert read.curves == recording.curves
    assert recording.losses is not None
    np.testing.assert_array_equal(read.losses, recording.losses)


def test_recordings_of_different_data_are_not_joined(recording: Recording) -> None:
    provenance = replace(recording.curves.provenance, task_digest="other")
    other = replace(recording, curves=replace(recording.curves, provenance=provenance))
    with pytest.raises(ValueError, match="differ in their data"):
        join_recordings(recording, other)
    assert len(join_recordings(recording, recording).curves.curves) == 4


def test_even_pace_takes_each_curves_fastest_stretch(recording: Recording) -> None:
    first, *rest = recording.curves.curves
    slow = replace(first.rungs[0], train_seconds=40.0, device_seconds=(40.0 + 3.0) * RATE)
    uneven = replace(first, rungs=(slow, *first.rungs[1:]))
    evened = even_pace(replace(recording, curves=replace(recording.curves, curves=(uneven, *rest))))
    assert evened.curves.curves[0].rungs[0].device_seconds == pytest.approx(first.rungs[0].device_seconds)


def test_what_a_configuration_is_worth_is_its_test_quality_where_that_is_known(recording: Recording) -> None:
    curve, failed = recording.curves.curves
    assert curve.final_quality == 0.7
    assert replace(curve, test_quality=0.65).final_quality == 0.65
    assert failed.final_quality is None
