"""Predicted seconds of stretches, learned from those that ended."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from autopeft.records import Bits, RungScore, TrialSpec
from autopeft.search.store import Trial

_SCORED = ("search", "baseline")


class Kind(NamedTuple):
    """Of a step: what its time depends on most."""

    method: str
    bits: Bits
    batch_size: int


def kind_of(spec: TrialSpec) -> Kind:
    return Kind(spec.method, spec.bits, spec.batch_size)


class Speed:
    """Pace by kind of step: what else slows one down differs less than kinds do."""

    def __init__(self) -> None:
        self._per_step: dict[Kind, list[float]] = {}
        self._medians: dict[Kind, float] = {}
        self._scoring: list[float] = []
        self._loads: dict[Bits, list[float]] = {}
        self._load_medians: dict[Bits | None, float] = {}
        """By width; of all of them under None."""

    def learn_load(self, bits: Bits, seconds: float) -> None:
        """Wall seconds in which a worker loaded a base of this width; 0 where it held one."""
        if seconds > 0:
            self._loads.setdefault(bits, []).append(seconds)
            self._load_medians[bits] = statistics.median(self._loads[bits])
            self._load_medians[None] = statistics.median(itertools.chain(*self._loads.values()))

    def predict_load(self, bits: Bits, held: Bits | None) -> float:
        """Wall seconds until a worker that holds a base of one width has one of another; 0 where all that there are
        stay loaded (`held` is None), or nothing is known. As others took for a width that was not timed yet."""
        if held in (None, bits) or not self._load_medians:
            return 0.0
        return self._load_medians.get(bits, self._load_medians[None])

    def learn(self, spec: TrialSpec, score: RungScore, num_steps: int, seconds: float) -> None:
        """`seconds` (wall) are the whole stretch's, without any loading of a base."""
        if num_steps == 0:
            # The untrained base was scored, which says nothing of a pace.
            return
        kind = kind_of(spec)
        self._per_step.setdefault(kind, []).append(score.train_seconds / num_steps)
        self._medians[kind] = statistics.median(self._per_step[kind])
        self._scoring.append(max(0.0, seconds - score.train_seconds))

    def learn_all(self, trials: Sequence[Trial]) -> None:
        """Of all their stretches so far, in the order in which those ended."""
        stretches = []
        for trial in trials:
            segments = {segment.step: segment for segment in trial.segments if segment.purpose in _SCORED}
            for before, score in zip([0, *(score.step for score in trial.rungs)], trial.rungs, strict=False):
                if (segment := segments.get(score.step)) is not None:
                    stretches.append((segment, trial.spec, score, score.step - before))
        for segment, spec, score, num_steps in sorted(stretches, key=lambda each: each[0].end_seconds):
            self.learn_load(spec.bits, segment.base_seconds)
            seconds = segment.end_seconds - segment.start_seconds - segment.loading_seconds - segment.base_seconds
            self.learn(spec, score, num_steps, seconds)

    def predict(
        self,
        kind: Kind,
        num_steps: int,
        *,
        passes: float = 1.0,
        unseen: Callable[[Iterable[float]], float] = max,
    ) -> float:
        """Wall seconds for so many steps and a scoring pass, or several; 0 as long as nothing is known.

        For a method not timed yet the slowest one's pace is taken: a stretch that does not fit the budget costs more
        than one that was not started. `unseen` takes another of the methods' paces.
        """
        if not self._scoring:
            return 0.0
        recent = self._scoring[-20:]
        # Building is in them, once; the cheapest is nearest to a pass alone.
        return num_steps * self._find_pace(kind, unseen) + max(recent) + (passes - 1) * min(recent)

    def _find_pace(self, kind: Kind, unseen: Callable[[Iterable[float]], float]) -> float:
        """Seconds a step. Until one of its size was timed, a larger batch is taken to need as much an example as others
        do, and a smaller one as much a step."""
        known = self._medians.get(kind)
        if known is not None:
            return known
        alike = [timed for timed in self._medians if timed.method == kind.method] or list(self._medians)
        return unseen(self._medians[timed] * max(1.0, kind.batch_size / timed.batch_size) for timed in alike)

    def predict_to_end(
        self, kind: Kind, step: int, rungs: Sequence[int], *, unseen: Callable[[Iterable[float]], float] = max
    ) -> float:
        """Wall seconds from `step` to the last rung, with a scoring pass at every one between."""
        steps = [step, *(rung for rung in rungs if rung > step)]
        return sum(self.predict(kind, b - a, unseen=unseen) for a, b in itertools.pairwise(steps))
