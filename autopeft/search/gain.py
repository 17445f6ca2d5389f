"""What a trial is expected to add to the front, were it trained to the end.

Costs are exact before a trial starts, so quality alone is uncertain. The expected hypervolume improvement is then a sum
over cells of the cost space, each with the expected improvement on the best quality that is had there already.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.records import RungScore
from autopeft.search.front import Points, find_nondominated
from autopeft.search.store import Trial

QUANTILES = np.array([-1.645, -1.036, -0.674, -0.385, -0.126, 0.126, 0.385, 0.674, 1.036, 1.645])
"""Standard normal quantiles at 5%, 15%, ..., 95%: a mean over them stands for the expectation."""
_PRIOR_GAIN_DEVIATION = 0.1
"""Spread of how much quality changes from one rung to the next, before any trial has shown it; counts as one trial."""
_PRIOR_SLOPE = -0.012
"""What quality is expected to gain up to the next rung for each standard deviation that a trial's loss is above the
mean. Over whole recordings of cola it is 0.000, -0.008 and -0.019 from rung to rung; on sst2 and trec, 0.007 to 0.042,
who is behind catches up. With more of it first scores seem to tell more than they do, and too many are bought: on cola
a fifth of the time finds 0.75 of the recorded hypervolume, with -0.025 0.72 and with -0.05 0.64 (means of 20 seeds); on
sst2 and trec as much with either, to 0.006."""
_PRIOR_SLOPE_COUNT = 3.0
"""Trials a standard deviation off in loss that have to show another slope before half of it is believed."""
_MOST_CELLS = 100_000
"""Between the costs of a front; with four objectives and more they are thinned to so many, and points on it are taken
for a little dearer than they are."""
_MOST_AT_ONCE = 2_000_000
_LEAST_SCORES = 8
"""Below, a line through scores says less than the scores themselves."""


class Forecast(NamedTuple):
    """Of the quality at full length."""

    mean: float
    deviation: float


class _Line(NamedTuple):
    """Quality against the logarithm of loss, and the variance of what lies off the line."""

    offset: float
    slope: float
    variance: float


class QualityModel:
    """What a score is worth once its luck is taken out, learned from all scores of a study.

    Quality on few examples is noisy, and loss is less so; at one rung they go together along one line for all trials,
    give or take. So a quality is drawn towards its rung's line, the more so the fewer examples it was scored on and the
    closer the others lie to the line. On the 63 runs of peft's method_comparison, whose accuracy at a fifth of the
    length has a rank correlation of 0.75 with the test accuracy at the end, it rises to 0.96.
    """

    def __init__(self, scores: Sequence[RungScore]) -> None:
        usable = [score for score in scores if _has_loss(score)]
        self._lines: dict[int, _Line] = {}
        for step in {score.step for score in usable}:
            here = [score for score in usable if score.step == step]
            if len(here) >= _LEAST_SCORES:
                self._lines[step] = _fit_line(here)

    def estimate(self, score: RungScore) -> Forecast:
        noise = sampling_variance(score)
        line = self._lines.get(score.step)
        if line is None or not _has_loss(score):
            return Forecast(score.quality, math.sqrt(noise))
        expected = line.offset + line.slope * math.log(score.loss)
        weight = line.variance / (line.variance + noise)
        return Forecast(weight * score.quality + (1 - weight) * expected, math.sqrt(weight * noise))


def _has_loss(score: RungScore) -> bool:
    return score.loss > 0 and math.isfinite(score.loss)


def _fit_line(scores: Sequence[RungScore]) -> _Line:
    x = np.log([score.loss for score in scores])
    y = np.array([score.quality for score in scores])
    noise = np.array([sampling_variance(score) for score in scores])
    spread = float(np.var(x))
    slope = float(np.mean((x - x.mean()) * (y - y.mean()))) / spread if spread > 0 else 0.0
    offset = float(y.mean() - slope * x.mean())
    squares = (y - offset - slope * x) ** 2
    # What the luck of the examples does not explain; never nothing, for it is only a line.
    return _Line(offset, slope, max(float(np.mean(squares - noise)), float(np.mean(squares)) / len(scores)))


def sampling_variance(score: RungScore) -> float:
    """Of an accuracy, by Laplace's estimate: a score of 0 or 1 on few examples is not certain.

    So it is where a spread was recorded: that of a model which gives everything one class is 0.
    """
    if score.quality_sd is not None:
        return max(score.quality_sd**2, 1 / score.num_examples) / score.num_examples
    # A correlation below 0, from a study that recorded no spread, is as uncertain as one of 0.
    share = (max(score.quality, 0.0) * score.num_examples + 1) / (score.num_examples + 2)
    return share * (1 - share) / score.num_examples


class _Growth(NamedTuple):
    """From one rung to the next, in quality."""

    step: Forecast
    """Of a trial whose loss is in the middle."""
    slope: float
    """For each standard deviation that its loss is above."""


class GrowthModel:
    """How quality grows from rung to rung, learned from every trial that has reached the next one.

    Losses differ before qualities do: on a hard task all answers are the most frequent label's for long, and the loss
    tells who is about to learn. So growth goes along a line with a trial's standing in loss at its rung: what has the
    lower loss is expected to gain more, until several have shown otherwise.
    """

    def __init__(self, trials: Sequence[Trial], rungs: Sequence[int]) -> None:
        self._rungs = tuple(rungs)
        scores = [score for trial in trials for score in trial.rungs]
        self._quality = QualityModel(scores)
        self._losses = {step: _measure_losses([score for score in scores if score.step == step]) for step in rungs}
        pairs: dict[int, list[tuple[float, float]]] = {step: [] for step in rungs}
        following = dict(itertools.pairwise(rungs))
        for trial in trials:
            for score, later in itertools.pairwise(trial.rungs):
                if following.get(score.step) != later.step:
                    continue
                growth = self.measure(later).mean - self.measure(score).mean
                pairs[score.step].append((self._place(score), growth))
        self._growths = {step: _fit_growth(found) for step, found in pairs.items()}
        noises = [sampling_variance(trial.rungs[-1]) for trial in trials if trial.rungs]
        self._noise = statistics.median(noises) if noises else 0.0

    def forecast(self, trial: Trial) -> Forecast:
        """From the last rung scored; errors of later rungs add up."""
        return self.forecast_from(trial.rungs[-1])

    def forecast_from(self, score: RungScore) -> Forecast:
        mean, deviation = self.measure(score)
        left = [self._growths[step] for step in self._rungs[:-1] if step >= score.step]
        mean += sum(growth.step.mean + growth.slope * self._place(score) for growth in left)
        return Forecast(mean, math.sqrt(deviation**2 + self._growth_variance(score.step)))

    def measure(self, score: RungScore) -> Forecast:
        """Of the quality at its own rung, as far as luck can be told from it."""
        return self._quality.estimate(score)

    def deviation_at(self, step: int) -> float:
        """Of a forecast made at that rung, from a score as noisy as the others."""
        return math.sqrt(self._noise + self._growth_variance(step))

    def _growth_variance(self, first: int) -> float:
        return sum(self._growths[step].step.deviation ** 2 for step in self._rungs[:-1] if step >= first)

    def _place(self, score: RungScore) -> float:
        """Standard deviations that the logarithm of its loss is above the mean at its rung."""
        losses = self._losses[score.step]
        if losses.deviation == 0 or not _has_loss(score):
            return 0.0
        return (math.log(score.loss) - losses.mean) / losses.deviation


def _measure_losses(scores: Sequence[RungScore]) -> Forecast:
    logarithms = [math.log(score.loss) for score in scores if _has_loss(score)]
    if not logarithms:
        return Forecast(0.0, 0.0)
    return Forecast(statistics.fmean(logarithms), statistics.pstdev(logarithms))


def _fit_growth(pairs: Sequence[tuple[float, float]]) -> _Growth:
    """Of (place in loss, growth)."""
    if not pairs:
        return _Growth(_pool([]), _PRIOR_SLOPE)
    places, growths = (np.array(values) for values in zip(*pairs, strict=True))
    off = places - places.mean()
    slope = float((off @ growths + _PRIOR_SLOPE * _PRIOR_SLOPE_COUNT) / (off @ off + _PRIOR_SLOPE_COUNT))
    return _Growth(_pool(list(growths - slope * places)), slope)


def _pool(growths: Sequence[float]) -> Forecast:
    """Mean and spread, the prior's spread counted as one trial."""
    centre = sum(growths) / len(growths) if growths else 0.0
    squares = sum((growth - centre) ** 2 for growth in growths) + _PRIOR_GAIN_DEVIATION**2
    return Forecast(centre, math.sqrt(squares / (len(growths) + 1)))


def expected_improvement(
    means: npt.NDArray[np.float64], deviations: npt.NDArray[np.float64], costs: Points, points: Points
) -> npt.NDArray[np.float64]:
    """(..., N) expected growth of the hypervolume up to 1 in every objective, were each candidate alone added to
    `points`.

    `means` (..., N) and `deviations` (N,) are of the first objective, `costs` (N, D - 1) are exact, and `points` (P, D)
    are had already; all are scaled as by `scale_point`: to be made small, 1 at the reference.
    """
    inside = points[(points < 1).all(axis=1)]
    levels, volumes = _measure_levels(inside[find_nondominated(inside)], costs)
    values = means + np.multiply.outer(QUANTILES, deviations).reshape(-1, *(1,) * (means.ndim - 1), means.shape[-1])
    improvement = np.zeros(means.shape)
    for level, volume in zip(levels, volumes.T, strict=True):
        improvement += np.maximum(level - values, 0.0).mean(axis=0) * volume
    return improvement


def _measure_levels(points: Points, costs: Points) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Between the points' costs lie cells: (levels,) what is the best first objective in some of them, and (N, levels)
    the volume that a candidate's costs leave it of the cells in which that is the best.

    Few values are best anywhere, and many cells share each, so that the expectation is taken once a value.
    """
    num_costs = costs.shape[1]
    edges = [np.unique(np.concatenate([[0.0], points[:, 1 + d]])) for d in range(num_costs)]
    if math.prod(len(edge) for edge in edges) > _MOST_CELLS:
        most = int(_MOST_CELLS ** (1 / num_costs))
        edges = [edge[np.unique(np.linspace(0, len(edge) - 1, most).round().astype(int))] for edge in edges]
    best = np.ones(tuple(len(edge) for edge in edges))
    for point in points:
        # To the next edge up, where not every cost has one of its own.
        reached = tuple(slice(int(np.searchsorted(edge, point[1 + d])), None) for d, edge in enumerate(edges))
        best[reached] = np.minimum(best[reached], point[0])
    levels, cells = np.unique(best, return_inverse=True)
    cells = cells.reshape(-1)
    order = np.argsort(cells, kind="stable")
    starts = np.searchsorted(cells[order], np.arange(len(levels)))
    chunk = max(1, _MOST_AT_ONCE // len(cells))
    volumes = np.empty((len(costs), len(levels)))
    for first in range(0, len(costs), chunk):
        some = costs[first : first + chunk]
        widths = np.ones((len(some), 1))
        for d, edge in enumerate(edges):
            clipped = np.maximum(np.append(edge[1:], 1.0) - np.maximum(edge, some[:, d : d + 1]), 0.0)
            widths = (widths[:, :, None] * clipped[:, None, :]).reshape(len(some), -1)
        volumes[first : first + chunk] = np.add.reduceat(widths[:, order], starts, axis=1)
    return levels, volumes
