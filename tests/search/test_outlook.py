"""What a search left undone: against processes whose gains are known, and in whole studies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.records import Completed, Cost, Outcome, RungScore, Segment, Stopped, TrialSpec, TrialState
from autopeft.search.front import hypervolume, scale_point
from autopeft.search.outlook import FEWEST_COMPLETED, GainModel, count_lost_members, find_outlook
from autopeft.search.store import Trial

if TYPE_CHECKING:
    from conftest import FakeStudies

RUNGS = (40, 80, 160)
REFERENCE = {"quality": 0.5, "vram": 1000.0, "params": 1000.0}
MakeTrial = Callable[..., Trial]


@pytest.fixture(scope="session")
def make_trial(make_spec: Callable[..., TrialSpec]) -> MakeTrial:
    def make_trial(
        *qualities: float, vram: int = 500, params: int = 100, state: TrialState | None = None, seconds: float = 10.0
    ) -> Trial:
        rungs = [
            RungScore(
                rung=rung, step=RUNGS[rung], quality=quality, loss=1.0, num_examples=10_000,
                device_seconds=seconds / len(qualities), train_seconds=1.0, scores_file="x", scores_digest="x",
            )
            for rung, quality in enumerate(qualities)
        ]  # fmt: skip
        state = state or ("complete" if len(qualities) == len(RUNGS) else "paused")
        outcome: Outcome | None = {
            "complete": Completed(), "stopped": Stopped(rung=0, rival=0, detail="")
        }.get(state)  # fmt: skip
        return Trial(
            number=0, spec=make_spec(), source="sampler", state=state, rungs=rungs, device_seconds=seconds,
            cost=Cost(trainable_parameters=params, head_parameters=1, peak_vram_bytes=vram, vram_source="estimated"),
            outcome=outcome,
        )  # fmt: skip

    return make_trial


def model(trials: list[Trial]) -> GainModel:
    """Of trials that were trained one after another."""
    return GainModel(in_order(trials), REFERENCE)


def in_order(trials: list[Trial]) -> list[Trial]:
    return [
        dataclasses.replace(
            trial,
            number=place,
            segments=[
                Segment(
                    worker=0,
                    trial=place,
                    purpose="search",
                    start_seconds=place,
                    end_seconds=place + 1,
                    step=trial.step or RUNGS[0],
                )
            ],
        )
        for place, trial in enumerate(trials)
    ]


def random_trials(make_trial: MakeTrial, number: int, seed: int) -> list[Trial]:
    """Complete ones from one distribution: the cheaper, the worse, give or take."""
    rng = np.random.default_rng(seed)
    trials = []
    for _ in range(number):
        size = rng.uniform()
        quality = min(0.99, 0.6 + 0.3 * size + 0.05 * rng.standard_normal())
        trials.append(make_trial(0.5, 0.5, quality, vram=int(100 + 800 * size), params=int(10 ** (3 * size))))
    return trials


@given(st.integers(FEWEST_COMPLETED, 30), st.integers(0, 5), st.randoms())
def test_the_order_in_which_trials_are_listed_says_nothing(
    make_trial: MakeTrial, number: int, seed: int, random: Any
) -> None:
    trials = random_trials(make_trial, number, seed)
    trials = in_order([*trials, make_trial(0.6), make_trial(0.7, 0.7), make_trial(0.55, state="stopped")])
    shuffled = random.sample(trials, len(trials))
    assert find_outlook(shuffled, RUNGS, REFERENCE) == find_outlook(trials, RUNGS, REFERENCE)


@given(st.integers(FEWEST_COMPLETED, 30), st.integers(0, 5), st.floats(0, 500), st.floats(0, 500))
def test_more_budget_never_promises_less_and_none_promises_nothing(
    make_trial: MakeTrial, number: int, seed: int, some: float, more: float
) -> None:
    found = model(random_trials(make_trial, number, seed))
    assert found.estimate(0.0).expected == 0.0
    assert 0.0 <= found.estimate(some).expected <= found.estimate(some + more).expected + 1e-12
    assert found.estimate_trials(0.0).expected == 0.0


def test_what_came_last_says_what_comes_next(make_trial: MakeTrial) -> None:
    def grow(*qualities: float) -> GainModel:
        """By the best quality after each quarter of 16 trials."""
        return model([make_trial(0.5, 0.5, quality) for quality in qualities for _ in range(4)])

    # Each doubling is expected to bring half of the one before; the last two both tell.
    # Where it has not grown for long it may yet.
    assert grow(0.6, 0.6, 0.6, 0.6).estimate_trials(16).expected == pytest.approx(0.005)
    assert grow(0.6, 0.8, 0.9, 0.9).estimate_trials(16).expected == pytest.approx((0.2 / 4 + 0.1 / 2) / 2 / 0.4)
    assert grow(0.6, 0.8, 0.8, 0.8).estimate_trials(16).expected == pytest.approx(0.2 / 4 / 2 / 0.3)
    assert grow(0.6, 0.6, 0.9, 0.9).estimate_trials(48).expected == pytest.approx(0.3 / 2 / 2 * 1.5 / 0.4)


def test_work_is_counted_in_steps_of_all_trials(make_trial: MakeTrial) -> None:
    # Four paused ones are as much work as one complete.
    early = [make_trial(0.5, 0.5, 0.6)] * 4
    late = [make_trial(0.5, 0.5, 0.8)] * 4
    alone, beside = model([*early, *late]), model([*[make_trial(0.5)] * 16, *early, *late])
    # Half of it was done when the better ones began, and two thirds after the paused ones.
    assert alone.estimate(80.0).expected == pytest.approx(0.2 / 2 / 2 / 0.3)
    assert beside.estimate(240.0).expected == pytest.approx((0.1 / 4 + 0.2 / 2) / 2 / 0.3)


def test_a_trial_that_failed_takes_none_of_what_came_after_it(make_trial: MakeTrial) -> None:
    def grow(*between: Trial) -> GainModel:
        return model([*[make_trial(0.5, 0.5, 0.6)] * 7, *between, make_trial(0.5, 0.5, 0.9)])

    failed = make_trial(state="failed")
    # A stretch that fails is charged for where it was to end, and scores nothing.
    assert failed.step == 0
    assert grow(failed).volume == grow().volume > model([make_trial(0.5, 0.5, 0.6)] * 8).volume
    assert grow(failed).estimate_trials(8).expected > 0.05


def test_what_was_refused_for_its_measured_memory_took_its_time(make_trial: MakeTrial) -> None:
    trials = [make_trial(0.5, 0.5, 0.6 + place / 50) for place in range(8)]
    measured, never_begun = make_trial(0.6, state="refused", seconds=7.0), make_trial(state="refused", seconds=0.0)
    assert model([*trials, measured, never_begun]).spent_seconds == model(trials).spent_seconds + 7.0
    assert model([*trials, measured, never_begun]).num_trials == 9


def test_paused_trials_go_on_though_no_new_one_may_be_begun(make_trial: MakeTrial) -> None:
    trials = [make_trial(0.5, 0.5, 0.6 + place / 50) for place in range(10)]
    assert model(trials).estimate_trials(0).expected == 0.0
    assert model([*trials, make_trial(0.7)]).estimate_trials(0).expected > 0.0


def test_trials_that_all_end_alike_promise_nothing_more(make_trial: MakeTrial) -> None:
    found = model([make_trial(0.5, 0.6, 0.8) for _ in range(20)])
    assert found.estimate(200.0).expected == pytest.approx(0.005)


def test_too_few_trials_say_nothing(make_trial: MakeTrial) -> None:
    trials = random_trials(make_trial, FEWEST_COMPLETED - 1, 0)
    assert not model(trials).can_tell
    assert find_outlook(trials, RUNGS, REFERENCE) is None


def test_a_stopped_trial_that_ends_level_with_its_rival_counts_half(make_trial: MakeTrial) -> None:
    # Both complete trials grow by 0.1 a rung, so the stopped one is forecast exactly where the cheaper rival is.
    trials = [make_trial(0.6, 0.7, 0.8, vram=400), make_trial(0.6, 0.7, 0.8, vram=400)]
    stopped = make_trial(0.6, state="stopped", vram=400)
    assert count_lost_members([*trials, stopped], RUNGS, REFERENCE) == pytest.approx(0.5, abs=0.05)


def test_a_stopped_trial_far_behind_would_have_been_on_no_front(make_trial: MakeTrial) -> None:
    trials = [make_trial(0.7 + i / 100, 0.8 + i / 100, 0.9 + i / 100, vram=400) for i in range(9)]
    stopped = make_trial(0.3, state="stopped", vram=500)
    assert count_lost_members([*trials, stopped], RUNGS, REFERENCE) < 0.01


def test_the_outlook_adds_up_what_stopped_trials_took_and_saved(make_trial: MakeTrial) -> None:
    trials = random_trials(make_trial, 10, 0)
    stopped = [make_trial(0.6, state="stopped", seconds=3.0), make_trial(0.6, 0.6, state="stopped", seconds=6.0)]
    found = find_outlook(in_order([*trials, *stopped]), RUNGS, REFERENCE)
    assert found is not None
    assert found.stopped_seconds == 9.0
    # What an interrupt lost is in the ledger by itself, and no part of what the search spent on it.
    stopped[0].device_seconds += 100
    assert find_outlook(in_order([*trials, *stopped]), RUNGS, REFERENCE).stopped_seconds == 9.0  # type: ignore[union-attr]
    stopped[0].device_seconds -= 100
    # 40 of 160 steps took 3 s, so the rest takes 9; 80 took 6, so the rest takes 6.
    assert found.saved_seconds == pytest.approx(15.0)
    assert [round(forecast.device_seconds, 6) for forecast in found.forecasts] == [27.25, 54.5, 109.0]
    assert all(f.low <= f.gain <= f.high for f in found.forecasts)


def test_the_volume_is_the_fronts(make_trial: MakeTrial) -> None:
    trials = random_trials(make_trial, 12, 0)
    points = np.array([scale_point(t.rungs[-1].quality, t.cost, REFERENCE) for t in trials if t.cost])
    assert model(trials).volume == pytest.approx(hypervolume(points, [1.0] * 3))


# --- ending early


def run(studies: FakeStudies, **changes: Any) -> Any:
    return studies.run(studies.create(**changes))


def test_a_search_ends_once_the_rest_promises_less_than_is_asked(make_studies: Callable[[], FakeStudies]) -> None:
    whole = run(make_studies(), budget="40trials")
    early = run(make_studies(), budget="40trials", least_gain=0.2)
    assert early.ledger.search_seconds < whole.ledger.search_seconds
    assert any("ended early" in note and "autopeft resume study" in note for note in early.notes)
    assert not any("ended early" in note for note in whole.notes)
    # Until then it decided as it would have decided anyway.
    assert [t.spec for t in early.trials] == [t.spec for t in whole.trials[: len(early.trials)]]


def test_a_threshold_that_is_never_met_changes_nothing(make_studies: Callable[[], FakeStudies]) -> None:
    whole, same = (run(make_studies(), budget="12trials", least_gain=least) for least in (None, 1e-9))
    assert [(t.spec, t.state) for t in same.trials] == [(t.spec, t.state) for t in whole.trials]
    assert same.notes == whole.notes


def test_a_search_too_short_to_tell_is_not_ended_early(make_studies: Callable[[], FakeStudies]) -> None:
    whole, same = (
        run(make_studies(), budget=f"{FEWEST_COMPLETED - 1}trials", least_gain=least) for least in (None, 1.0)
    )
    assert [(t.spec, t.state) for t in same.trials] == [(t.spec, t.state) for t in whole.trials]
    assert same.notes == whole.notes


def test_a_clocked_search_that_ends_early_confirms_and_leaves_time_unspent(
    make_studies: Callable[[], FakeStudies],
) -> None:
    early = run(make_studies(), budget="60min", least_gain=0.2)
    assert any("ended early" in note for note in early.notes)
    assert early.ledger.wall_seconds < 50 * 60
    assert any(trial.confirmations for trial in early.trials)


def test_what_waits_and_does_not_fit_the_time_holds_up_no_early_end(
    studies: FakeStudies, make_spec: Callable[..., TrialSpec]
) -> None:
    early = run(studies, budget="60min", least_gain=0.2, included=(make_spec(batch_size=10_000),))
    assert [trial.state for trial in early.trials if trial.source == "included"] == ["waiting"]
    assert any("ended early" in note for note in early.notes)


def test_a_study_that_ended_early_goes_on_without_its_threshold(studies: FakeStudies) -> None:
    early = run(studies, budget="40trials", least_gain=0.2)
    assert any("ended early" in note for note in early.notes)
    store = studies.open()
    store.save_config(dataclasses.replace(store.config, least_gain=None))
    went_on = studies.run(store)
    assert went_on.ledger.search_seconds > early.ledger.search_seconds
    assert not any("ended early" in note for note in went_on.notes)


def test_every_study_of_some_trials_has_an_outlook(studies: FakeStudies) -> None:
    record = run(studies, budget="16trials")
    assert record.outlook is not None
    assert [forecast.trials for forecast in record.outlook.forecasts] == [4.0, 8.0, 16.0]
    assert all(math.isfinite(forecast.gain) for forecast in record.outlook.forecasts)
