"""Adapter size and latency as objectives: exact in advance the one, measured once and shared the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from autopeft.backends.base import Pack
from autopeft.executors.inline import InlineExecutor
from autopeft.methods import METHODS
from autopeft.records import Cost, StudyRecord, TrialSpec, from_record, to_record
from autopeft.search.front import cost_vector, parse_objectives, round_latency, scale_point
from autopeft.search.plan import raise_budget, restore_space
from autopeft.search.study import Search

if TYPE_CHECKING:
    from conftest import FakeStudies

    from autopeft.search.store import StudyStore

MakeSpec = Callable[..., TrialSpec]

SPACE = """
methods:
  lora: {rank: {low: 1, high: 64}, bits: [unquantized, 4]}
  prompt_tuning: {num_virtual_tokens: [4, 32], bits: [unquantized]}
  bottleneck: {bottleneck_size: [8, 64], bits: [unquantized]}
"""
OBJECTIVES = ("quality", "size", "latency")
BASE_SECONDS = 0.01


def test_objectives_are_named_and_ordered() -> None:
    assert parse_objectives("latency,quality,size") == ("quality", "size", "latency")
    assert parse_objectives("quality,latency") == ("quality", "latency")


def make_cost(**changes: object) -> Cost:
    cost = Cost(
        trainable_parameters=1000, head_parameters=100, peak_vram_bytes=10**9, vram_source="estimated",
        adapter_bytes=4400, latency_seconds=0.01,
    )  # fmt: skip
    return Cost(**{**to_record(cost), **changes})


def test_noise_below_a_step_is_a_tie_and_more_is_not() -> None:
    def latency(seconds: float) -> float:
        return cost_vector(make_cost(latency_seconds=seconds), ["quality", "latency"])[0]

    assert latency(0.0100) == latency(0.0101)
    assert latency(0.0100) < latency(0.0106) < latency(0.0120)


def test_rounding_moves_by_at_most_half_a_step() -> None:
    for seconds in (1e-5, 0.00731, 0.2, 3.9):
        assert round_latency(seconds) == pytest.approx(seconds, rel=0.0251)


def test_what_should_be_known_and_is_not_never_wins() -> None:
    unknown = make_cost(adapter_bytes=None, latency_seconds=None)
    assert cost_vector(unknown, OBJECTIVES) == (float("inf"), float("inf"))


def test_scaled_costs_are_one_at_the_reference() -> None:
    reference = {"quality": 0.5, "size": 4400.0, "latency": round_latency(0.01)}
    assert scale_point(0.5, make_cost(), reference) == [1.0, 1.0, 1.0]


def run(studies: FakeStudies, **changes: object) -> StudyRecord:
    return studies.run(studies.create(space=SPACE, objectives=OBJECTIVES, **{"budget": "12trials", **changes}))


@pytest.fixture(scope="module")
def record(make_studies: Callable[[], FakeStudies]) -> StudyRecord:
    return run(make_studies(), workers=2)


def test_every_scored_trial_has_both_costs(record: StudyRecord) -> None:
    scored = [trial for trial in record.trials if trial.rungs]
    assert len(scored) == 12
    for trial in scored:
        assert trial.cost is not None
        assert trial.cost.latency_seconds is not None
        assert trial.cost.adapter_bytes == 4 * (trial.cost.trainable_parameters + 130)


def test_what_merges_is_as_fast_as_the_base_and_nothing_else_is(record: StudyRecord) -> None:
    for trial in record.trials:
        assert trial.cost is not None
        assert trial.cost.latency_seconds is not None
        if METHODS[trial.spec.method].merges:
            assert trial.cost.latency_seconds == pytest.approx(BASE_SECONDS)
        else:
            assert trial.cost.latency_seconds > 1.05 * BASE_SECONDS
    assert {METHODS[trial.spec.method].merges for trial in record.trials} == {True, False}


def test_the_front_is_that_of_the_objectives_asked_for(record: StudyRecord) -> None:
    assert list(record.reference) == ["quality", "size", "latency"]
    assert record.reference["latency"] == pytest.approx(2 * BASE_SECONDS)
    assert record.hypervolume is not None
    assert record.hypervolume > 0
    knee = next(pick for pick in record.picks if pick.name == "knee")
    assert knee.why == "best exchange of quality for bytes on disk"


def test_confirmations_say_what_serving_costs(record: StudyRecord) -> None:
    confirmed = [trial for trial in record.trials if trial.confirmations]
    assert confirmed
    for trial in confirmed:
        for confirmation in trial.confirmations:
            assert confirmation.inference is not None
            assert confirmation.inference.device == "x, 1 thread"
            assert (confirmation.inference.merged is not None) == METHODS[trial.spec.method].merges
    assert from_record(StudyRecord, to_record(record)) == record


def test_confirmations_measure_whatever_the_objectives_are(studies: FakeStudies) -> None:
    record = studies.run(studies.create(budget="5trials"))
    inference = [c.inference for trial in record.trials for c in trial.confirmations]
    assert inference
    assert None not in inference
    assert all(trial.cost is None or trial.cost.latency_seconds is None for trial in record.trials)


class Listening(InlineExecutor):
    """Notes which trials were asked to be measured, and can tire the machine."""

    def __init__(self, executor: InlineExecutor) -> None:
        self.__dict__.update(executor.__dict__)
        self.measured: list[TrialSpec] = []

    def assign(self, worker: int, pack: Pack) -> None:
        for stretch in pack.stretches:
            if stretch.purpose == "search" and stretch.measure_inference:
                assert stretch.from_step == 0
                self.measured.append(stretch.spec)
        super().assign(worker, pack)


def search_listening(studies: FakeStudies, store: StudyStore) -> tuple[StudyRecord, Listening]:
    executor = Listening(studies.executor(store))
    return Search(store, executor, restore_space(store.config)).run(), executor


def test_only_what_does_not_merge_is_measured_and_once_for_the_same_modules(studies: FakeStudies) -> None:
    store = studies.create(space=SPACE, objectives=OBJECTIVES, budget="60trials")
    record, executor = search_listening(studies, store)
    assert executor.measured
    assert not any(METHODS[spec.method].merges for spec in executor.measured)
    keys = [spec.modules_key() for spec in executor.measured]
    assert len(set(keys)) == len(keys)
    # The space has few of them, so that some trials must have shared.
    others = [t for t in record.trials if t.rungs and not METHODS[t.spec.method].merges]
    assert len(others) > len(keys)


def test_a_resumed_study_goes_on_comparing_with_what_it_began_with(
    studies: FakeStudies, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = studies.create(space=SPACE, objectives=OBJECTIVES, budget="6trials")
    first, _ = search_listening(studies, store)
    # By now the machine is three times as busy: everything takes longer, the base too.
    from autopeft.backends import fake

    calm = fake.fake_latency
    monkeypatch.setattr(fake, "fake_latency", lambda times: calm(3 * times))
    store = studies.open()
    store.save_config(dataclasses.replace(store.config, budget=raise_budget(store, "16trials")))
    second, executor = search_listening(studies, store)
    assert second.reference == first.reference
    assert executor.measured
    for trial in second.trials:
        if trial.cost is not None and METHODS[trial.spec.method].merges:
            assert trial.cost.latency_seconds == pytest.approx(BASE_SECONDS)
        elif trial.cost is not None:
            assert trial.cost.latency_seconds == pytest.approx(
                fake.fake_inference(trial.spec).unmerged.single_seconds / 3
            )
