"""What was left undone: what stopped trials might have been, and what more budget would bring.

What the search added to the front's hypervolume in its second quarter and in its second half says what each doubling of
its work brought, new trials and finished ones together, as it went about them. Every doubling is expected to bring half
of what the one before it did, since a search that begins with what promises most leaves less and less. So both tell
what the next one may bring, and their mean is taken.

Drawing subsets of the trials at random instead (rarefaction, as ecologists extrapolate counts of species,
doi:10.1890/13-0133.1) would suit trials that come at random; of a search that learns it expects many times too much.
`benchmarks/outlook.py` sets the estimate beside what more budget did bring, on recorded runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.records import GainForecast, Outlook
from autopeft.search.front import Points, hypervolume, scale_point
from autopeft.search.gain import GrowthModel
from autopeft.search.store import Trial

FEWEST_COMPLETED = 8
"""Trials at their full length below which nothing is said of more."""
_SHARES = (0.25, 0.5, 1.0)
"""Of what the search has spent: the larger budgets that an outlook tells of."""
_RATIO = 0.5
"""Of what a doubling of the work brings to what the one before it did."""
_LEAST = 0.005
"""Share of the hypervolume that a doubling is expected to bring at least: what has not grown for long may yet."""
_BETWEEN = (0.0, 4.0)
"""Realised over expected: four in five of those that `benchmarks/outlook.py` measured lie between."""


class Gain(NamedTuple):
    """Growth of the front's hypervolume."""

    expected: float
    low: float
    high: float


class GainModel:
    """Expected growth of the front's hypervolume with more of the search, learned from what the study has done.

    A function of the trials' scores, costs, device-seconds and the order in which stretches ended.
    """

    def __init__(self, trials: Sequence[Trial], reference: dict[str, float]) -> None:
        # What was refused before it began took no time; what measured too dear did.
        begun = _sort(t for t in trials if t.state not in ("waiting", "running") and (t.rungs or t.state != "refused"))
        self.num_trials = len(begun)
        self.spent_seconds = sum(trial.device_seconds for trial in begun)
        completed, self._work = _list_completed(begun, reference)
        self._num_completed = len(completed)
        self._left = sum(trial.spec.max_steps - trial.step for trial in begun if trial.state == "paused")
        volumes = [_volume_by(completed, share * self._work) for share in (0.25, 0.5, 1.0)]
        self.volume = volumes[-1]
        first, last = (b - a for a, b in itertools.pairwise(volumes))
        self._next = max((_RATIO**2 * first + _RATIO * last) / 2, _LEAST * self.volume)

    @property
    def can_tell(self) -> bool:
        return self._num_completed >= FEWEST_COMPLETED and self.volume > 0

    def estimate(self, more_seconds: float) -> Gain:
        """With so many more device-seconds of search, as a share of the hypervolume."""
        return self._extrapolate(more_seconds / self.spent_seconds if self.spent_seconds else 0.0)

    def estimate_trials(self, more_trials: float) -> Gain:
        """With so many more trials and all the paused ones going on beside: a budget in trials knows no time."""
        more_work = self._left + more_trials * self._work / self.num_trials if self.num_trials else 0.0
        return self._extrapolate(more_work / self._work if self._work else 0.0)

    def _extrapolate(self, share: float) -> Gain:
        """By that share more of the work: doublings and parts of them."""
        grown = self._next * (1 - _RATIO ** math.log2(1 + share)) / (1 - _RATIO)
        expected = grown / self.volume
        return Gain(expected, _BETWEEN[0] * expected, _BETWEEN[1] * expected)


def expect_rest(
    trials: Sequence[Trial], reference: dict[str, float], *, device_seconds: float, num_trials: float
) -> float | None:
    """Expected growth, as a share of the hypervolume, with what is left of a search's budget: device-seconds and trials
    to start, either of them inf where it bounds nothing. None where too little was tried to say, or nothing bounds it.
    """
    model = GainModel(trials, reference)
    if not model.can_tell:
        return None
    gains = []
    if math.isfinite(device_seconds):
        gains.append(model.estimate(max(0.0, device_seconds)))
    if math.isfinite(num_trials):
        gains.append(model.estimate_trials(max(0.0, num_trials)))
    return min((gain.expected for gain in gains), default=None)


class _Done(NamedTuple):
    """A trial at its full length."""

    work: int
    """Steps that all trials had trained by then."""
    point: list[float]


def _list_completed(trials: Sequence[Trial], reference: dict[str, float]) -> tuple[list[_Done], int]:
    """In the order in which they ended, and the steps of all trials. Steps, not seconds: with a budget in trials
    nothing that is decided may depend on the clock."""
    ended = sorted(
        ((segment.end_seconds, segment.step, place) for place, trial in enumerate(trials) for segment in trial.segments
         if segment.purpose == "search")
    )  # fmt: skip
    steps = [0] * len(trials)
    work = 0
    found = []
    for _, step, place in ended:
        # The step of a stretch which failed is where it was to end.
        work += step - steps[place]
        steps[place] = step
        trial = trials[place]
        if trial.state == "complete" and trial.cost is not None and step == trial.rungs[-1].step:
            found.append(_Done(work, _point(trial, reference)))
    return found, work


def _volume_by(completed: Sequence[_Done], work: float) -> float:
    points = [done.point for done in completed if done.work <= work]
    return _volume(np.array(points)) if points else 0.0


def find_outlook(trials: Sequence[Trial], rungs: Sequence[int], reference: dict[str, float]) -> Outlook | None:
    """None where no trial was stopped and nothing can be said of more."""
    model = GainModel(trials, reference)
    stopped = [trial for trial in trials if trial.state == "stopped" and trial.rungs and trial.cost is not None]
    if not model.can_tell and not stopped:
        return None
    forecasts = []
    for share in _SHARES if model.can_tell else ():
        seconds = share * model.spent_seconds
        found = model.estimate(seconds)
        forecasts.append(
            GainForecast(
                device_seconds=seconds, trials=share * model.num_trials, gain=found.expected, low=found.low,
                high=found.high,
            )
        )  # fmt: skip
    return Outlook(
        stopped_seconds=sum(map(_spent_seconds, stopped)),
        saved_seconds=sum(_seconds_to_end(trial, rungs) for trial in stopped),
        stopped_members=count_lost_members(trials, rungs, reference),
        forecasts=tuple(forecasts),
    )


def count_lost_members(trials: Sequence[Trial], rungs: Sequence[int], reference: dict[str, float]) -> float:
    """How many of the stopped trials would have been on the front, each beside the complete ones alone: expected, by
    what their last rungs forecast."""
    trials = _sort(trials)
    stopped = [trial for trial in trials if trial.state == "stopped" and trial.rungs and trial.cost is not None]
    if not stopped:
        return 0.0
    complete = [_point(trial, reference) for trial in trials if trial.state == "complete" and trial.cost is not None]
    points = np.array(complete, dtype=float).reshape(len(complete), len(reference))
    rows, deviations = _forecast(stopped, GrowthModel(trials, rungs), reference)
    members = 0.0
    for row, deviation in zip(rows, deviations, strict=True):
        no_dearer = points[(points[:, 1:] <= row[1:]).all(axis=1), 0]
        bar = min(no_dearer, default=1.0)
        members += 0.5 * math.erfc((row[0] - bar) / (max(deviation, 1e-12) * math.sqrt(2)))
    return members


def _forecast(
    trials: Sequence[Trial], growth: GrowthModel, reference: dict[str, float]
) -> tuple[Points, npt.NDArray[np.float64]]:
    """(N, objectives) where they are expected to end, scaled, and (N,) the first one's standard deviation."""
    rows, deviations = [], []
    for trial in trials:
        assert trial.cost is not None
        forecast = growth.forecast(trial)
        rows.append(scale_point(min(forecast.mean, 1.0), trial.cost, reference))
        deviations.append(forecast.deviation / (1 - reference["quality"]))
    return np.array(rows), np.array(deviations)


def _sort(trials: Iterable[Trial]) -> list[Trial]:
    """By what they showed: sums over them do not depend on their order then, to the last digit."""
    return sorted(
        trials, key=lambda t: (t.device_seconds, [(s.step, s.quality, s.loss) for s in t.rungs], t.state, t.spec.key())
    )


def _point(trial: Trial, reference: dict[str, float]) -> list[float]:
    assert trial.cost is not None
    values = [trial.rungs[-1].quality, *(confirmation.quality for confirmation in trial.confirmations)]
    return scale_point(sum(values) / len(values), trial.cost, reference)


def _seconds_to_end(trial: Trial, rungs: Sequence[int]) -> float:
    """Device-seconds, at the pace that the trial has shown."""
    return _spent_seconds(trial) * (rungs[-1] - trial.step) / trial.step


def _spent_seconds(trial: Trial) -> float:
    """On what it was scored for; what an interrupt lost is told apart."""
    return sum(score.device_seconds for score in trial.rungs)


def _volume(points: Points) -> float:
    """Hypervolume; of many points a few decide, so the others are dropped first."""
    kept = []
    points = points[(points < 1).all(axis=1)]
    while len(points):
        # Nothing that is left dominates the one with the least sum.
        least = points[np.argmin(points.sum(axis=1))]
        kept.append(least)
        points = points[~(least <= points).all(axis=1)]
    return hypervolume(np.array(kept), [1.0] * points.shape[1]) if kept else 0.0
