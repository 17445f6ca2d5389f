"""What was left undone: what stopped trials might have been, and what more budget would bring.

**More trials.** Draw subsets of a study's trials at random: the hypervolume of n/8, n/4, n/2 and n of them says what
each doubling brought, whatever the order in which they came (rarefaction, as ecologists extrapolate counts of species,
doi:10.1890/13-0133.1). Each doubling brings less than the one before, by a ratio that the study shows, and the next is
expected to. Trials that were stopped or failed are draws that added nothing, at what they cost.

**Paused trials.** What each is expected to add were it trained to its end (`gain.py`), for what that takes. They are
taken before new trials where they promise more per second; new trials add to a front that has them already.

Trials of a sampler that learns are better than the earlier ones, and the later ones among them add to the front what
random order would not show; configurations that are tried first on purpose are the other way round.
`benchmarks/outlook.py` sets the estimate beside what more budget did bring, on recorded runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.records import GainForecast, Outlook
from autopeft.search.front import Points, hypervolume, scale_point
from autopeft.search.gain import GrowthModel, expected_improvement
from autopeft.search.store import Trial

FEWEST_DRAWS = 8
"""Trials below which nothing is said of more."""
_SHARES = (0.25, 0.5, 1.0)
"""Of what the search has spent: the larger budgets that an outlook tells of."""
_SUBSETS = 48
_BETWEEN = (0.0, 2.5)
"""Realised over expected: four in five of those that `benchmarks/outlook.py` measured lie between."""


class Gain(NamedTuple):
    """Growth of the front's hypervolume."""

    expected: float
    low: float
    high: float


class _Promotion(NamedTuple):
    """A paused trial, trained to its end."""

    gain: float
    seconds: float
    """Device-seconds that it needs."""


class GainModel:
    """Expected growth of the front's hypervolume with more of the search, learned from the study's own trials.

    A function of the trials' scores, costs and device-seconds alone, whatever their order.
    """

    def __init__(self, trials: Sequence[Trial], rungs: Sequence[int], reference: dict[str, float]) -> None:
        draws = _sort(trial for trial in trials if trial.state not in ("waiting", "refused", "running"))
        self.num_draws = len(draws)
        self.spent_seconds = sum(trial.device_seconds for trial in draws)
        complete = [_point(trial, reference) for trial in draws if trial.state == "complete" and trial.cost is not None]
        points = np.array(complete, dtype=float).reshape(len(complete), len(reference))
        self.volume = _volume(points)
        paused = [trial for trial in draws if trial.state == "paused" and trial.rungs and trial.cost is not None]
        self._promotions: list[_Promotion] = []
        if paused:
            rows, deviations = _forecast(paused, GrowthModel(draws, rungs), reference)
            self._promotions = _list_promotions(paused, rungs, rows, deviations, points)
            # New trials add to a front that the paused ones will have reached: what both would add counts once.
            points = np.vstack([points, rows])
        self._points = points
        self._doublings = self._list_doublings() if self.can_tell else [0.0, 0.0, 0.0]

    @property
    def can_tell(self) -> bool:
        return self.num_draws >= FEWEST_DRAWS and self.volume > 0

    @property
    def ratio(self) -> float:
        """What a doubling of the trials brings, as a share of what the doubling before it brought, in [0, 1]."""
        first, second, third = self._doublings
        return min(1.0, (second + third) / (first + second)) if first + second > 0 else 0.0

    def estimate(self, more_seconds: float) -> Gain:
        """With so many more device-seconds of search, as a share of the hypervolume."""
        promoted = 0.0
        for promotion in self._promotions:
            # New trials promise the less the more of them there are; at first they promise the most.
            rate = self._gain_of_new(promotion.seconds) / promotion.seconds
            if promotion.seconds <= more_seconds and promotion.gain / promotion.seconds > rate:
                more_seconds -= promotion.seconds
                promoted += promotion.gain
        return self._add_new(promoted, more_seconds / self.spent_seconds if self.spent_seconds else 0.0)

    def estimate_trials(self, more_trials: float) -> Gain:
        """With so many more trials, all the paused ones going on beside: a budget in trials knows no time."""
        promoted = sum(promotion.gain for promotion in self._promotions)
        return self._add_new(promoted, more_trials / self.num_draws)

    def _gain_of_new(self, seconds: float) -> float:
        return self._extrapolate(seconds / self.spent_seconds) if self.spent_seconds else 0.0

    def _add_new(self, promoted: float, share: float) -> Gain:
        expected = (promoted + self._extrapolate(share)) / self.volume
        return Gain(expected, _BETWEEN[0] * expected, _BETWEEN[1] * expected)

    def _extrapolate(self, share: float) -> float:
        """Of that share of the draws more: doublings and parts of them, each by `ratio` less than the one before."""
        doublings, ratio, last = math.log2(1 + share), self.ratio, self._doublings[-1]
        if ratio in (0.0, 1.0):
            return last * ratio * doublings
        return float(last * ratio * (1 - ratio**doublings) / (1 - ratio))

    def _list_doublings(self) -> list[float]:
        """What going from n/8 of the draws to n/4, from there to n/2, and from there to all brought on average."""
        volumes = [float(np.mean(self._subset_volumes(self.num_draws / part))) for part in (8, 4, 2)]
        return [b - a for a, b in zip(volumes, [*volumes[1:], self.volume], strict=True)]

    def _subset_volumes(self, size: float) -> npt.NDArray[np.float64]:
        """(subsets,) hypervolumes of what random draws of that size hold; between whole sizes at random."""
        rng = np.random.default_rng(0)
        volumes = np.empty(_SUBSETS)
        for b in range(_SUBSETS):
            whole = math.floor(size) + int(rng.random() < size % 1)
            chosen = rng.permutation(self.num_draws)[:whole]
            # Draws beyond the points added nothing.
            volumes[b] = _volume(self._points[np.sort(chosen[chosen < len(self._points)])])
        return volumes


def find_outlook(trials: Sequence[Trial], rungs: Sequence[int], reference: dict[str, float]) -> Outlook | None:
    """None where no trial was stopped and nothing can be said of more."""
    model = GainModel(trials, rungs, reference)
    stopped = [trial for trial in trials if trial.state == "stopped" and trial.rungs and trial.cost is not None]
    if not model.can_tell and not stopped:
        return None
    forecasts = []
    for share in _SHARES if model.can_tell else ():
        seconds = share * model.spent_seconds
        found = model.estimate(seconds)
        forecasts.append(
            GainForecast(
                device_seconds=seconds, trials=share * model.num_draws, gain=found.expected, low=found.low,
                high=found.high,
            )
        )  # fmt: skip
    return Outlook(
        stopped_seconds=sum(trial.device_seconds for trial in stopped),
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


def _list_promotions(
    paused: Sequence[Trial], rungs: Sequence[int], rows: Points, deviations: npt.NDArray[np.float64], points: Points
) -> list[_Promotion]:
    """Paused trials, what promises most per step first; each is expected to end as forecast before the next.

    `rows` (N, objectives) and `deviations` (N,) are their forecasts, `points` what is complete. Steps, not seconds:
    with a budget in trials nothing that is decided may depend on the clock.
    """
    steps = [rungs[-1] - trial.step for trial in paused]
    left = list(range(len(paused)))
    found = []
    while left:
        gains = expected_improvement(rows[left, 0], deviations[left], rows[left][:, 1:], points)
        best = max(range(len(left)), key=lambda i: (gains[i] / steps[left[i]], -rows[left[i], 0]))
        found.append(_Promotion(float(gains[best]), max(1e-9, _seconds_to_end(paused[left[best]], rungs))))
        points = np.vstack([points, rows[left.pop(best)]])
    return found


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
    return trial.device_seconds * (rungs[-1] - trial.step) / trial.step


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
