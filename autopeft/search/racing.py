"""Racing the front: which paused trials are stopped for good.

A trial may be stopped only by a rival at the same rung that costs no more on every cost objective and is clearly better
there. So the cheap end of the front is never sacrificed to the accurate end, as it is when quality alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contender:
    """A trial as it stands at one rung."""

    number: int
    costs: tuple[float, ...]
    """On each cost objective; empty where quality alone is sought."""
    quality: float
    losses: npt.NDArray[np.float64]
    """(N,) per-example losses, in the same order of examples for all contenders."""


class Verdict(NamedTuple):
    rival: int
    detail: str


class RacingRule(Protocol):
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
    """Judges by the mean paired difference of per-example losses in units of its standard error."""

    z_at_end: float = 2.0
    """Standard errors that count as clear at the full length; more are asked for earlier, see `z_at`."""

    def z_at(self, progress: float) -> float:
        """Inversely proportional to progress: early on a gap says as much of who starts fast as of who ends well.

        On `demo`, LoRA's recipe was 4 standard errors behind the bottleneck adapter's at a quarter of the length, and
        level with it at the end.
        """
        return self.z_at_end / progress

    def judge(
        self, trial: Contender, rivals: Sequence[Contender], *, progress: float, majority_quality: float
    ) -> Verdict | None:
        able = [
            rival
            for rival in rivals
            if rival.number != trial.number
            and all(r <= t for r, t in zip(rival.costs, trial.costs, strict=True))
            # Loss is the sharper signal, but a confident model can have worse loss and better answers.
            and rival.quality >= trial.quality
            and beats_majority(rival.quality, majority_quality, len(rival.losses))
        ]
        best: Verdict | None = None
        best_z = self.z_at(progress)
        for rival in able:
            z = paired_z(trial.losses, rival.losses)
            if z > best_z:
                gap = float(np.mean(trial.losses - rival.losses))
                best_z = z
                best = Verdict(
                    rival.number,
                    f"trial {rival.number} costs no more and has {gap:.3f} nats less loss on the same examples "
                    f"({z:.1f} standard errors; {self.z_at(progress):.1f} are clear here)",
                )
        return best


def paired_z(losses: npt.NDArray[np.float64], rival_losses: npt.NDArray[np.float64]) -> float:
    """Mean of (own - rival) over its standard error; positive where the rival is better, 0 where they are equal."""
    differences = losses - rival_losses
    mean = float(np.mean(differences))
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    if deviation == 0.0:
        return 0.0 if mean == 0.0 else math.copysign(math.inf, mean)
    return mean / (deviation / math.sqrt(len(differences)))


def beats_majority(quality: float, majority_quality: float, num_examples: int) -> bool:
    """Whether by more than two standard errors of an accuracy near one half."""
    return quality > majority_quality + 1.0 / math.sqrt(num_examples)
