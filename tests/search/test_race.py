"""Who is compared with whom, on trials made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from autopeft.records import Cost, RungScore, Stopped
from autopeft.search.plan import restore_space
from autopeft.search.race import Race
from autopeft.search.racing import PairedRacing
from autopeft.search.store import Trial

if TYPE_CHECKING:
    from conftest import FakeStudies

RUNGS = (40, 80, 160)
NOISE = np.random.default_rng(0).normal(0.0, 0.05, 300)


class Studied:
    """Trials with mean losses at their rungs, all of the same cost."""

    def __init__(self, studies: FakeStudies) -> None:
        self.config = studies.config(rungs=RUNGS)
        self.spec = restore_space(self.config).recipes[0]
        self.trials: list[Trial] = []
        self.told: set[int] = set()

    def add(self, *losses: float, state: str = "paused") -> Trial:
        cost = Cost(trainable_parameters=9, head_parameters=1, peak_vram_bytes=9, vram_source="estimated")
        rungs = [
            RungScore(
                rung=rung, step=RUNGS[rung], quality=1.5 - loss, loss=loss, num_examples=300, device_seconds=1.0,
                train_seconds=1.0, scores_file=str(loss), scores_digest="",
            )
            for rung, loss in enumerate(losses)
        ]  # fmt: skip
        number = len(self.trials)
        trial = Trial(number=number, spec=self.spec, source="sampler", state=state, cost=cost, rungs=rungs)  # type: ignore[arg-type]
        self.trials.append(trial)
        return trial

    def race(self) -> Race:
        store: Any = SimpleNamespace(
            config=self.config, trials=self.trials, baseline=None,
            read_losses=lambda file: float(file) + np.roll(NOISE, round(100 * float(file))),
            may_revive=lambda trial: trial.state == "stopped" and trial.number not in self.told,
        )  # fmt: skip
        return Race(store, PairedRacing())


@pytest.fixture
def studied(studies: FakeStudies) -> Studied:
    return Studied(studies)


def numbers(decisions: Any) -> list[tuple[int, int | None]]:
    return [(decision.trial.number, decision.verdict and decision.verdict.rival) for decision in decisions]


def test_a_newcomer_stops_the_worse_at_its_rung_and_changes_nothing_itself(studied: Studied) -> None:
    worse, elsewhere, newcomer = studied.add(0.9), studied.add(0.9, 0.9), studied.add(0.5)
    before = [replace(trial) for trial in studied.trials]
    assert numbers(studied.race().judge_newcomer(newcomer)) == [(worse.number, newcomer.number)]
    assert studied.trials == before
    assert elsewhere.state == "paused"


def test_a_newcomer_is_stopped_by_one_that_has_gone_on_since(studied: Studied) -> None:
    ahead, newcomer = studied.add(0.5, 0.5), studied.add(0.9)
    assert numbers(studied.race().judge_newcomer(newcomer)) == [(newcomer.number, ahead.number)]


def test_what_nothing_would_stop_now_goes_on(studied: Studied) -> None:
    studied.add(0.9)
    stopped = studied.add(0.9, state="stopped")
    assert numbers(studied.race().judge_all()) == [(stopped.number, None)]


@pytest.mark.parametrize("state", ["refused", "failed"])
def test_what_is_over_a_limit_or_failed_stops_nobody_and_what_it_stopped_goes_on(studied: Studied, state: str) -> None:
    studied.add(0.5, 0.5, state=state)
    studied.add(0.9)
    stopped = studied.add(0.9, state="stopped")
    assert numbers(studied.race().judge_all()) == [(stopped.number, None)]


def test_what_was_stopped_for_good_stays_so(studied: Studied) -> None:
    studied.add(0.9)
    studied.told.add(studied.add(0.9, state="stopped").number)
    assert numbers(studied.race().judge_all()) == []


def test_what_is_still_beaten_stays_stopped(studied: Studied) -> None:
    studied.add(0.5, state="complete")
    studied.add(0.9, state="stopped")
    assert numbers(studied.race().judge_all()) == []


def test_the_last_rung_stops_nobody(studied: Studied) -> None:
    worse = studied.add(0.9, 0.9, 0.9, state="complete")
    newcomer = studied.add(0.5, 0.5, 0.5, state="complete")
    assert numbers(studied.race().judge_newcomer(newcomer)) == []
    assert worse.state == "complete"


@pytest.mark.parametrize(
    ("majority_quality", "losses"),
    [(0.5, (0.96, 0.92)), (0.96, (0.55, 0.505))],
    ids=["half", "leaves little to learn"],
)
def test_a_score_beats_the_majority_by_two_standard_errors(
    studied: Studied, majority_quality: float, losses: tuple[float, float]
) -> None:
    # Two are 0.06 at one half and 0.02 beside 1, on 300 examples; a quality is 1.5 less the loss.
    studied.config = replace(studied.config, majority_quality=majority_quality)
    worse, better = (studied.add(loss).rungs[0] for loss in losses)
    race = studied.race()
    assert not race.beats_floor(worse)
    assert race.beats_floor(better)


def test_what_a_failed_trial_had_stopped_goes_on_or_is_stopped_by_another(studied: Studied) -> None:
    failed, middle = studied.add(0.5, state="failed"), studied.add(0.7)
    by_it, too, by_another = (studied.add(loss, state="stopped") for loss in (0.7, 0.9, 0.9))
    for trial, rival in ((by_it, failed), (too, failed), (by_another, middle)):
        trial.outcome = Stopped(rung=0, rival=rival.number, detail="")
    assert numbers(studied.race().judge_beaten_by(failed)) == [(by_it.number, None), (too.number, middle.number)]
    studied.told.add(by_it.number)
    assert numbers(studied.race().judge_beaten_by(failed)) == [(too.number, middle.number)]
