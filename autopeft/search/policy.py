"""What a free worker does next: start a trial, promote a paused one, or nothing. Pure functions of the study's state.

Breadth before depth: as in asynchronous successive halving (arXiv:1810.05934) one in `ETA` of the trials at a rung may
go on while new ones can still be started; which one is decided by non-dominated layer, so cheap trials are promoted
beside accurate ones. When nothing new can be started, everything that racing left alive goes on, best first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from autopeft.records import RungScore, TrialSpec
from autopeft.search.front import cost_vector, rank_layers
from autopeft.search.racing import beats_majority
from autopeft.search.store import Trial

ETA = 2


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
    objectives: tuple[str, ...]
    majority_quality: float
    num_workers: int
    seconds_left: float
    """Wall seconds until the search must end; inf where no clock bounds it."""
    trials_left: float
    can_suggest: bool
    """Whether the space may still hold something new."""
    recipes_left: bool


class Speed:
    """Predicted seconds of stretches, learned from those that ended."""

    def __init__(self) -> None:
        self._per_step: dict[str, list[float]] = {}
        self._scoring: list[float] = []

    def learn(self, spec: TrialSpec, score: RungScore, num_steps: int, threads: float) -> None:
        self._per_step.setdefault(spec.method, []).append(score.train_seconds / num_steps)
        self._scoring.append(max(0.0, score.device_seconds / threads - score.train_seconds))

    def predict(self, spec: TrialSpec | None, num_steps: int) -> float:
        """Wall seconds for so many steps and a scoring pass; 0 as long as nothing is known.

        For a configuration not yet chosen (None) the slowest method's pace is taken: a stretch that does not fit the
        budget costs more than one that was not started.
        """
        if not self._scoring:
            return 0.0
        medians = {method: float(np.median(values)) for method, values in self._per_step.items()}
        per_step = medians.get(spec.method) if spec is not None else None
        if per_step is None:
            per_step = max(medians.values())
        return num_steps * per_step + float(np.max(self._scoring[-20:]))


def next_rung(trial: Trial, rungs: Sequence[int]) -> int:
    """Steps of the next rung that the trial has not reached."""
    return next(rung for rung in rungs if rung > trial.step)


def choose_next(situation: Situation, speed: Speed) -> StartNew | Promote | Wait:
    paused = order_paused(situation)
    affordable = [trial for trial in paused if _can_complete(trial, situation, speed)]
    may_start = _may_start(situation, affordable, speed)
    if may_start and situation.recipes_left:
        return StartNew()
    for trial in affordable:
        if not may_start or _has_quota(trial, situation):
            return Promote(trial.number)
    if may_start:
        return StartNew()
    if paused and not affordable:
        return Wait("time")
    if situation.trials_left <= 0:
        return Wait("trials")
    return Wait("time" if situation.can_suggest else "none_left")


def order_paused(situation: Situation) -> list[Trial]:
    """Paused trials, the most promising first: by non-dominated layer among all scored at their rung, rung, loss.

    What does not yet beat the majority class comes last, however cheap: it is on no front that anybody wants.
    """
    layer_of: dict[int, int] = {}
    at_chance: dict[int, bool] = {}
    for step in situation.rungs:
        at_rung = [(trial, score) for trial in situation.trials for score in trial.rungs if score.step == step]
        if at_rung:
            points = np.array(
                [
                    [-score.quality, *cost_vector(trial.cost, situation.objectives)]
                    for trial, score in at_rung
                    if trial.cost is not None
                ]
            )
            for (trial, score), layer in zip(at_rung, rank_layers(points), strict=True):
                if trial.step == score.step:
                    layer_of[trial.number] = int(layer)
                    at_chance[trial.number] = not beats_majority(
                        score.quality, situation.majority_quality, score.num_examples
                    )
    paused = [trial for trial in situation.trials if trial.state == "paused"]
    return sorted(paused, key=lambda t: (at_chance[t.number], layer_of[t.number], -t.step, t.rungs[-1].loss))


def _has_quota(trial: Trial, situation: Situation) -> bool:
    """Whether fewer than one in ETA of the trials that reached its rung have gone on from it."""
    reached = [t for t in situation.trials if any(score.step == trial.step for score in t.rungs)]
    went_on = [t for t in reached if t.step > trial.step or t.state == "running"]
    return len(went_on) < len(reached) // ETA


def _can_complete(trial: Trial, situation: Situation, speed: Speed) -> bool:
    """Whether the full length is within reach; a trial that ends between rungs would have cost time for nothing."""
    return _seconds_to_end(trial, situation, speed) <= situation.seconds_left


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
