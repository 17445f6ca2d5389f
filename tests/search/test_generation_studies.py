"""Studies of generation tasks: the untrained base is scored first, and is what trials must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from autopeft.records import StudyRecord
from autopeft.search.race import Race
from autopeft.search.racing import Contender, PairedRacing
from autopeft.search.store import StudyStore

if TYPE_CHECKING:
    from conftest import FakeStudies

TASK = "{name: places, title: Places, kind: generation, prompt: '{a}', completion: '{b}'}"
GENERATION: dict[str, Any] = {
    "task": TASK, "task_name": "places", "task_kind": "generation", "scorer": "token_accuracy", "model": "llama",
    "majority_quality": 0.0, "majority_test_quality": 0.0, "budget": "8trials",
}  # fmt: skip


@pytest.fixture
def finished(studies: FakeStudies) -> StudyRecord:
    return studies.run(studies.create(**GENERATION, workers=2))


def test_the_untrained_base_is_scored_once_at_step_0_with_the_test(finished: StudyRecord) -> None:
    base = finished.baseline
    assert base is not None
    assert [score.step for score in base.rungs] == [0]
    assert base.state == "complete"
    assert finished.config.majority_quality == base.rungs[0].quality
    assert finished.config.majority_test_quality == base.rungs[0].quality
    assert finished.reference["quality"] == base.rungs[0].quality
    assert [s.purpose for s in finished.segments].count("baseline") == 1


def test_no_trial_starts_before_there_is_something_to_beat(finished: StudyRecord) -> None:
    end = next(s.end_seconds for s in finished.segments if s.purpose == "baseline")
    assert all(s.start_seconds >= end for s in finished.segments if s.purpose != "baseline")


def test_picks_beat_the_base_and_hold_on_the_test(finished: StudyRecord) -> None:
    best = next(t for t in finished.trials if t.number == finished.picks[0].number)
    assert best.quality is not None
    assert best.quality > finished.config.majority_quality
    assert best.confirmations
    assert finished.hypervolume is not None
    assert 0 < finished.hypervolume < 1


def contender(number: int, losses: np.ndarray) -> Contender:  # type: ignore[type-arg]
    return Contender(
        number=number,
        step=40,
        costs=(1.0, 1.0),
        quality=0.5,
        num_examples=300,
        loss=float(losses.mean()),
        losses=losses,
    )


def base_losses(store: StudyStore) -> np.ndarray:  # type: ignore[type-arg]
    assert store.baseline is not None
    losses = store.read_losses(store.baseline.rungs[-1].scores_file)
    assert losses is not None
    return losses


@pytest.mark.parametrize(("gain", "is_stopped"), [(-0.5, False), (0.0, False), (0.3, True)])
def test_only_a_rival_that_beats_the_untrained_base_stops_a_trial(
    gain: float, is_stopped: bool, studies: FakeStudies, finished: StudyRecord
) -> None:
    store = studies.open()
    base = base_losses(store)
    noise = np.random.default_rng(0).normal(0, 0.05, len(base))
    rival, trial = contender(0, base - gain + noise), contender(1, base - gain + 1.0)
    verdict = Race(store, PairedRacing()).judge(trial, [rival])
    assert (verdict is not None) == is_stopped


def test_a_driver_killed_while_the_base_was_scored_scores_it_again(studies: FakeStudies) -> None:
    store = studies.create(**GENERATION)
    search = studies.search(store)
    search._start()
    search._assign_idle_workers()
    assert store.baseline is not None
    assert store.baseline.state == "running"
    record = studies.run(studies.open())
    assert record.baseline is not None
    assert record.config.majority_quality == record.baseline.rungs[-1].quality > 0
    assert record.picks


def test_a_resumed_study_keeps_what_there_is_to_beat(studies: FakeStudies, finished: StudyRecord) -> None:
    again = studies.open()
    assert again.config.majority_quality == finished.config.majority_quality
    assert studies.run(again).reference == finished.reference
