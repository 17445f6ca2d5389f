"""What a trial is expected to add to the front, were it trained to the end.

Costs are exact before a trial starts, so quality alone is uncertain. The expected hypervolume improvement is then a sum
over cells of the cost space, each with the expected improvement on the best quality that is had there already.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.search.front import Points
from autopeft.search.store import Trial

_QUANTILES = np.array([-1.645, -1.036, -0.674, -0.385, -0.126, 0.126, 0.385, 0.674, 1.036, 1.645])
"""Standard normal quantiles at 5%, 15%, ..., 95%: a mean over them stands for the expectation."""
_PRIOR_GAIN_DEVIATION = 0.1
"""Spread of how much quality changes from one rung to the next, before any trial has shown it; counts as one trial."""


class Forecast(NamedTuple):
    """Of the quality at full length."""

    mean: float
    deviation: float


class GrowthModel:
    """How quality grows from rung to rung, learned from every trial that has reached the next one."""

    def __init__(self, trials: Sequence[Trial], rungs: Sequence[int]) -> None:
        self._rungs = tuple(rungs)
        self._growths: dict[int, list[float]] = {step: [] for step in rungs}
        for trial in trials:
            quality_at = {score.step: score.quality for score in trial.rungs}
            for step, following in itertools.pairwise(rungs):
                if step in quality_at and following in quality_at:
                    self._growths[step].append(quality_at[following] - quality_at[step])

    def forecast(self, trial: Trial) -> Forecast:
        """From the last rung scored; errors of later rungs add up."""
        last = trial.rungs[-1]
        mean, variance = last.quality, last.quality * (1 - last.quality) / last.num_examples
        for step in self._rungs[:-1]:
            if step >= last.step:
                growths = np.array(self._growths[step])
                centre = float(growths.mean()) if len(growths) else 0.0
                squares = float(((growths - centre) ** 2).sum()) + _PRIOR_GAIN_DEVIATION**2
                mean += centre
                variance += squares / (len(growths) + 1)
        return Forecast(mean, float(np.sqrt(variance)))


def expected_improvement(
    means: npt.NDArray[np.float64], deviations: npt.NDArray[np.float64], costs: Points, points: Points
) -> npt.NDArray[np.float64]:
    """(N,) expected growth of the hypervolume up to 1 in every objective, were each candidate alone added to `points`.

    `means` and `deviations` (N,) are of the first objective, `costs` (N, D - 1) are exact, and `points` (P, D) are had
    already; all are scaled as by `scale_point`: to be made small, 1 at the reference.
    """
    inside = points[(points < 1).all(axis=1)]
    best, widths = _best_by_cell(inside, costs)
    # (Q, N, cells): where the candidate's quality, at each quantile, is better than what the cell has.
    values = means + np.multiply.outer(_QUANTILES, deviations)
    gains = np.maximum(best.reshape(1, 1, -1) - values[:, :, None], 0.0).mean(axis=0)
    improvement: npt.NDArray[np.float64] = (gains * widths).sum(axis=1)
    return improvement


def _best_by_cell(points: Points, costs: Points) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Cells between the points' costs: (cells,) the best first objective had there, and (N, cells) how much of each
    cell's volume a candidate's costs leave it."""
    num_costs = costs.shape[1]
    best = np.ones((1,) * num_costs)
    widths = np.ones((len(costs), 1))
    edges = [np.unique(np.concatenate([[0.0], points[:, 1 + d]])) for d in range(num_costs)]
    if num_costs:
        best = np.ones(tuple(len(edge) for edge in edges))
    for point in points:
        reached = tuple(slice(int(np.searchsorted(edge, point[1 + d])), None) for d, edge in enumerate(edges))
        best[reached] = np.minimum(best[reached], point[0])
    for d, edge in enumerate(edges):
        ends = np.append(edge[1:], 1.0)
        clipped = np.maximum(ends - np.maximum(edge, costs[:, d : d + 1]), 0.0)
        widths = (widths[:, :, None] * clipped[:, None, :]).reshape(len(costs), -1)
    return best.reshape(-1), widths
