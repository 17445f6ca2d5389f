"""Racing the front: which paused trials are stopped for good.

A trial may be stopped only by a rival at the same rung that costs no more on every cost objective and is clearly better
there. So the cheap end of the front is never sacrificed to the accurate end, as it is when quality alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contender:
    """A trial as it stands at one rung."""

    number: int
    step: int
    """Of the rung."""
    costs: tuple[float, ...]
    """On each cost objective; empty where quality alone is sought."""
    quality: float
    num_examples: int
    """That quality was scored on."""
    loss: float
    """The mean, as it was recorded."""
    losses: npt.NDArray[np.float64] | None
    """(N,) per-example losses, in the same order of examples for all contenders; None where they were not kept."""


class Verdict(NamedTuple):
    rival: int
    detail: str


LossCurve = Mapping[float, float]
"""Mean loss by progress in (0, 1], at the rungs that a trial has reached."""


class RacingRule(Protocol):
    def learn(self, curves: Sequence[LossCurve]) -> RacingRule:
        """The rule as it judges once it knows how these trials went; equal to itself where that teaches it nothing.

        It learns from those at their end alone, whatever their order. Every verdict depends on the rule, the trial and
        one rival. So while the rule stays equal, old verdicts stand, and only a newcomer to a rung has to be compared.
        """
        ...

    def judge(
        self, trial: Contender, rivals: Sequence[Contender], *, progress: float, majority_quality: float
    ) -> Verdict | None:
        """The rival that stops the trial, or None.

        `rivals` have been scored at the same rung; `progress` is the rung's step over the full length, in (0, 1).

        Every rule keeps three laws: a trial that dominates all others is never stopped; the cheapest is never stopped
        by a dearer one; nothing is stopped at a rung where no trial yet beats the majority class.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRacing:
    """Judges by the mean paired difference of per-example losses.

    A gap is clear where it is wider than what two things explain together: the luck of the examples, and what gaps that
    were seen to reverse measured typically. Early on it says as much of who starts fast as of who ends well: on `demo`,
    LoRA's recipe was 4 standard errors behind the bottleneck adapter's at a quarter of the length, and level with it at
    the end.
    """

    z_at_end: float = 2.0
    """Standard errors of the paired difference that are clear at the full length."""
    least_completed: int = 8
    """Trials at their end before what reverses is learned from them."""
    reversal: float | None = None
    """Nats of loss, times progress, of a typical gap that reverses; what `learn` finds, to the nearest half octave,
    since all verdicts are asked for anew whenever it changes."""

    def margin_at(self, progress: float, error: float) -> float:
        """Nats of loss that are clear at a rung, where `error` is the difference's standard error.

        Until reversals are known, the standard errors asked for are as many times those at the end as the end is away.
        """
        if self.reversal is None:
            return self.z_at_end * error / progress
        return math.hypot(self.z_at_end * error, self.reversal / progress)

    def learn(self, curves: Sequence[LossCurve]) -> PairedRacing:
        typical = _learn_reversal(curves, self.least_completed)
        if not 0 < typical < math.inf:
            return replace(self, reversal=None)
        return replace(self, reversal=2 ** (round(2 * math.log2(typical)) / 2))

    def judge(
        self, trial: Contender, rivals: Sequence[Contender], *, progress: float, majority_quality: float
    ) -> Verdict | None:
        assert trial.losses is not None, "paired racing needs per-example losses; see LearnedRacing"
        best: Verdict | None = None
        best_lead = 0.0
        for rival in sorted(rivals, key=lambda each: each.loss):
            if trial.loss - rival.loss - self.margin_at(progress, 0.0) <= best_lead:
                # None that is left can lead by more: means as recorded are those of the losses, but for rounding.
                break
            # Loss is the sharper signal, but a confident model can have worse loss and better answers.
            if rival.quality < trial.quality or not _may_stop(rival, trial, majority_quality):
                continue
            assert rival.losses is not None
            gap, error = paired_gap(trial.losses, rival.losses)
            margin = self.margin_at(progress, error)
            if gap - margin > best_lead:
                best_lead = gap - margin
                best = Verdict(
                    rival.number,
                    f"trial {rival.number} costs no more and has {gap:.3f} nats less loss on the same examples "
                    f"({margin:.3f} are clear here)",
                )
        return best


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedRacing:
    """Judges by the gap in mean loss, where per-example losses are not kept.

    A gap is clear where it is wider than gaps that were seen to reverse: of two trials that both went on to the end,
    the one ahead at a rung ended behind. Early gaps reverse more easily than late ones; their width goes with the
    inverse of progress, as in `PairedRacing`, so that all rungs together teach one scale. Until enough have reached the
    end nothing is stopped. That costs little, since what is paused waits behind what promises more.

    On the 63 runs of peft's method_comparison these defaults train what is worth training in a seventh of the time, and
    in a third with parameters as an objective; docs/search.md has the figures, and how they were chosen.
    """

    least_completed: int = 3
    """Trials at their end before anything is stopped."""
    widening: float = 1.0
    """How many times the typical reversed gap is clear."""
    scale: float = math.inf
    """Nats of loss that are clear at the full length; what `learn` finds."""

    def learn(self, curves: Sequence[LossCurve]) -> LearnedRacing:
        return replace(self, scale=self.widening * _learn_reversal(curves, self.least_completed))

    def margin_at(self, progress: float) -> float:
        """Nats of loss that are clear at a rung."""
        return self.scale / progress

    def judge(
        self, trial: Contender, rivals: Sequence[Contender], *, progress: float, majority_quality: float
    ) -> Verdict | None:
        margin = self.margin_at(progress)
        best: Verdict | None = None
        best_gap = margin
        for rival in rivals:
            gap = trial.loss - rival.loss
            if gap > best_gap and _may_stop(rival, trial, majority_quality) and not _clearly_worse(rival, trial):
                best_gap = gap
                best = Verdict(
                    rival.number,
                    f"trial {rival.number} costs no more and has {gap:.3f} nats less loss "
                    f"({margin:.3f} are clear here)",
                )
        return best


def _may_stop(rival: Contender, trial: Contender, majority_quality: float) -> bool:
    return (
        rival.number != trial.number
        and all(r <= t for r, t in zip(rival.costs, trial.costs, strict=True))
        and beats_majority(rival.quality, majority_quality, rival.num_examples)
    )


def _clearly_worse(rival: Contender, trial: Contender) -> bool:
    """Whether the rival's quality is too low to stop the trial, whatever its loss.

    A rival that costs less may be behind by two standard errors of a difference of accuracies near one half: on few
    examples quality says little. At equal costs it may not, for then the trial dominates it.
    """
    allowed = 0.0 if rival.costs == trial.costs else math.sqrt(1 / rival.num_examples + 1 / trial.num_examples)
    return rival.quality < trial.quality - allowed


def _learn_reversal(curves: Sequence[LossCurve], least_completed: int) -> float:
    """The typical one of those at their end; infinite before enough are, and where they do not differ."""
    completed = [curve for curve in curves if 1.0 in curve]
    return (typical_reversal(completed) or math.inf) if len(completed) >= least_completed else math.inf


def typical_reversal(curves: Sequence[LossCurve]) -> float:
    """Root mean square of the gaps, times progress, between trials of which the one behind ended ahead.

    `curves` reach the end. Where no ranking was reversed, the median of all gaps: most were wider than it takes.
    Infinite where there is no gap to learn from.
    """
    gaps, reversals = [], []
    ends = np.array([curve[1.0] for curve in curves])
    for progress in sorted({progress for curve in curves for progress in curve if progress < 1.0}):
        losses = np.array([curve.get(progress, math.nan) for curve in curves])
        first, second = np.triu_indices(len(curves), 1)
        early, late = losses[first] - losses[second], ends[first] - ends[second]
        gaps.append(np.abs(early[np.isfinite(early)]) * progress)
        reversals.append(np.abs(early[early * late < 0]) * progress)
    all_gaps, all_reversals = np.concatenate([*gaps, []]), np.concatenate([*reversals, []])
    if len(all_reversals):
        return float(np.sqrt(np.mean(all_reversals**2)))
    return float(np.median(all_gaps)) if len(all_gaps) else math.inf


def paired_gap(losses: npt.NDArray[np.float64], rival_losses: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean of (own - rival), which is positive where the rival is better, and its standard error."""
    differences = losses - rival_losses
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return float(np.mean(differences)), deviation / math.sqrt(len(differences))


def beats_majority(quality: float, majority_quality: float, num_examples: int) -> bool:
    """Whether by more than two standard errors of an accuracy near one half."""
    return quality > majority_quality + 1.0 / math.sqrt(num_examples)
