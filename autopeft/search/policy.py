"""What a free worker does next: start a trial, promote a paused one, or nothing. Pure functions of the study's state.

Breadth before depth: as in asynchronous successive halving (arXiv:1810.05934) one in `ETA` of the trials at a rung may
go on while new ones can still be started. Which one is decided by what it is expected to add to the front per second of
training that it still needs, so cheap trials are promoted beside accurate ones, and neither twice; in every third turn
quality alone counts. When nothing new can be started, everything that racing left alive goes on in that order.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from autopeft.records import RungScore, TrialSpec
from autopeft.search.front import scale_point
from autopeft.search.gain import GrowthModel, expected_improvement
from autopeft.search.store import Trial

ETA = 2
_QUALITY_EVERY = 3


class StartNew(NamedTuple):
    pass


class Promote(NamedTuple):
    number: int


class Wait(NamedTuple):
    """Nothing to do; `reason` says why."""

    reason: Literal["trials", "time", "none_left"]


class Situation(NamedTuple):
    """What a decision may depend on."""

    trials: Sequence[Trial]
    rungs: tuple[int, ...]
    reference: dict[str, float]
    """Of the hypervolume: the worst quality and costs that count."""
    num_workers: int
    seconds_left: float
    """Wall seconds until the search must end; inf where no clock bounds it."""
    trials_left: float
    can_suggest: bool
    """Whether the space may still hold something new."""
    recipes_left: bool
    revivable: Sequence[Trial] = ()
    """Stopped trials whose verdict may still fall."""


class Speed:
    """Predicted seconds of stretches, learned from those that ended."""

    def __init__(self) -> None:
        self._per_step: dict[str, list[float]] = {}
        self._medians: dict[str, float] = {}
        self._scoring: list[float] = []

    def learn(self, spec: TrialSpec, score: RungScore, num_steps: int, threads: float) -> None:
        if num_steps == 0:
            # The untrained base was scored, which says nothing of a pace.
            return
        self._per_step.setdefault(spec.method, []).append(score.train_seconds / num_steps)
        self._medians[spec.method] = statistics.median(self._per_step[spec.method])
        self._scoring.append(max(0.0, score.device_seconds / threads - score.train_seconds))

    def predict(self, spec: TrialSpec | None, num_steps: int) -> float:
        """Wall seconds for so many steps and a scoring pass; 0 as long as nothing is known.

        For a configuration not yet chosen (None) the slowest method's pace is taken: a stretch that does not fit the
        budget costs more than one that was not started.
        """
        if not self._scoring:
            return 0.0
        per_step = self._medians.get(spec.method) if spec is not None else None
        if per_step is None:
            per_step = max(self._medians.values())
        return num_steps * per_step + max(self._scoring[-20:])


def next_rung(trial: Trial, rungs: Sequence[int]) -> int:
    """Steps of the next rung that the trial has not reached."""
    return next(rung for rung in rungs if rung > trial.step)


def choose_next(situation: Situation, speed: Speed) -> StartNew | Promote | Wait:
    paused = order_paused(situation, speed)
    affordable = [trial for trial in paused if _can_complete(trial, situation, speed)]
    may_start = _may_start(situation, affordable, speed)
    if may_start and situation.recipes_left:
        return StartNew()
    for trial in affordable:
        if not may_start or _has_quota(trial, situation):
            return Promote(trial.number)
    if may_start:
        return StartNew()
    for trial in _order_revivals(situation, speed):
        return Promote(trial.number)
    if paused and not affordable:
        return Wait("time")
    if situation.trials_left <= 0:
        return Wait("trials")
    return Wait("time" if situation.can_suggest else "none_left")


def order_paused(situation: Situation, speed: Speed) -> list[Trial]:
    """Paused trials, the most promising first, as by `order_by_worth`."""
    return order_by_worth([trial for trial in situation.trials if trial.state == "paused"], situation, speed)


def _order_revivals(situation: Situation, speed: Speed) -> list[Trial]:
    """Stopped trials to go on with in time that nothing else can use, the most promising first.

    Verdicts can be wrong, and time that is left cannot be saved. Without a clock in the budget there is no end of it.
    """
    if math.isinf(situation.seconds_left):
        return []
    within = [trial for trial in situation.revivable if _can_complete(trial, situation, speed)]
    return order_by_worth(within, situation, speed)


def order_by_worth(trials: Sequence[Trial], situation: Situation, speed: Speed) -> list[Trial]:
    """By expected growth of the front's hypervolume per second still needed (per step without a clock in the budget);
    of the best quality, where it is quality's turn.

    The front is that of the complete trials and, as they are forecast, of the running ones.
    """
    trials = [trial for trial in trials if trial.cost is not None]
    if not trials:
        return []
    growth = GrowthModel(situation.trials, situation.rungs)
    had = [trial for trial in situation.trials if trial.state in ("complete", "running") and trial.rungs]
    points = [_forecast_point(trial, growth, situation)[0] for trial in had]
    rows = [_forecast_point(trial, growth, situation) for trial in trials]
    candidates = np.array([row for row, _ in rows])
    seen = 1 if _is_turn_of_quality(situation.trials) else candidates.shape[1]
    gains = expected_improvement(
        candidates[:, 0],
        np.array([deviation for _, deviation in rows]),
        candidates[:, 1:seen],
        np.array(points, dtype=float).reshape(len(points), candidates.shape[1])[:, :seen],
    )

    def worth(index: int) -> tuple[float, int, float]:
        trial = trials[index]
        steps = float(situation.rungs[-1] - trial.step)
        # Without a clock in the budget decisions may not depend on one; before the first stretch it has told nothing.
        needed = steps if math.isinf(situation.seconds_left) else _seconds_to_end(trial, situation, speed) or steps
        return -float(gains[index]) / needed, -trial.step, trial.rungs[-1].loss

    return [trials[index] for index in sorted(range(len(trials)), key=worth)]


def _is_turn_of_quality(trials: Sequence[Trial]) -> bool:
    """Whether the next promotion goes by quality whatever it costs, as every `_QUALITY_EVERY`th does.

    The hypervolume gives nothing to what costs as much as its reference, full fine-tuning foremost, and little to what
    costs nearly that much: without turns of its own the accurate end of the front would be found last or never.
    benchmarks/README.md has what they change.
    """
    promotions = sum(len(trial.rungs) - 1 + (trial.state == "running") for trial in trials if trial.rungs)
    return promotions % _QUALITY_EVERY == _QUALITY_EVERY - 1


def _forecast_point(trial: Trial, growth: GrowthModel, situation: Situation) -> tuple[list[float], float]:
    """Where the trial is expected to end, scaled to [0, 1] per objective, and the first one's standard deviation."""
    assert trial.cost is not None
    forecast = growth.forecast(trial)
    scale = 1 - situation.reference["quality"]
    return scale_point(forecast.mean, trial.cost, situation.reference), forecast.deviation / scale


def _has_quota(trial: Trial, situation: Situation) -> bool:
    """Whether fewer than one in ETA of the trials that reached its rung have gone on from it."""
    reached = [t for t in situation.trials if any(score.step == trial.step for score in t.rungs)]
    went_on = [t for t in reached if t.step > trial.step or t.state == "running"]
    return len(went_on) < len(reached) // ETA


def _can_complete(trial: Trial, situation: Situation, speed: Speed) -> bool:
    """Whether the full length is within reach; a trial that ends between rungs would have cost time for nothing."""
    return math.isinf(situation.seconds_left) or _seconds_to_end(trial, situation, speed) <= situation.seconds_left


def _seconds_to_end(trial: Trial, situation: Situation, speed: Speed) -> float:
    steps = [trial.step, *(rung for rung in situation.rungs if rung > trial.step)]
    return sum(speed.predict(trial.spec, b - a) for a, b in itertools.pairwise(steps))


def _may_start(situation: Situation, affordable: Sequence[Trial], speed: Speed) -> bool:
    """Whether a new trial's first stretch fits beside bringing the promising ones to their end."""
    if situation.trials_left <= 0 or not situation.can_suggest:
        return False
    if math.isinf(situation.seconds_left):
        return True
    first = speed.predict(None, situation.rungs[0])
    # The running ones count in full: their last stretches compete for the same workers.
    running = [trial for trial in situation.trials if trial.state == "running"]
    reserved = sum(_seconds_to_end(trial, situation, speed) for trial in [*running, *_front_of(affordable, situation)])
    return first + reserved / situation.num_workers <= situation.seconds_left


def _front_of(affordable: Sequence[Trial], situation: Situation) -> list[Trial]:
    """The paused trials that would go on if the search ended now: the better half."""
    return list(affordable[: math.ceil(len(affordable) / ETA)])
