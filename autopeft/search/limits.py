"""What may be started: limits on memory and parameters, judged with what the study's measurements have taught.

On a GPU the probe of each trial measures what had been estimated. The differences, fitted over the trials on the same
base, are added to later estimates; where nothing was measured, estimates are taken as they are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from autopeft.backends.base import CONTEXT_BYTES
from autopeft.records import Bits, Cost, Failed, StudyConfig
from autopeft.search.store import Trial

_FEWEST_FOR_A_SLOPE = 4
_LEAST_SPREAD = 1.5
"""Between the smallest and the largest estimate: a slope fitted to less would be noise."""


_AMPLE_SHARE = 0.8
"""Of the room that a GPU has: what is taken to need less fits there by all that is known."""
_MORE_ROOM = 1.05
"""Times the room that something ran out in: what a GPU has free differs a little from day to day."""


class Overhead(NamedTuple):
    """What to add to an estimate: `fixed_bytes` plus `share` of it."""

    fixed_bytes: float
    share: float
    num_trials: int
    """That it was fitted to."""

    def correct(self, estimated_bytes: int) -> int:
        return max(0, round(estimated_bytes + self.fixed_bytes + self.share * estimated_bytes))


class Judgement(NamedTuple):
    rule: str | None
    """Why it may not be started, or None."""
    excess: float
    """By what share the worst limit is exceeded; 0 where none is."""


def measured_pairs(trials: Sequence[Trial], bits: Bits | None = None) -> list[tuple[int, int]]:
    """(estimated, measured) peaks of trials, on bases of that width. Out of memory is no measurement of a peak."""
    return [
        (cost.estimated_vram_bytes, cost.peak_vram_bytes)
        for trial in trials
        if (cost := trial.cost) is not None
        and cost.vram_source == "measured"
        and cost.estimated_vram_bytes is not None
        and not ran_out(trial)
        and bits in (None, trial.spec.bits)
    ]


def fit_overhead(pairs: Sequence[tuple[int, int]]) -> Overhead:
    """The medians of slopes and of offsets (Theil and Sen), which one odd measurement does not move."""
    surplus = [measured - estimated for estimated, measured in pairs]
    if not pairs:
        return Overhead(0.0, 0.0, 0)
    estimates = [estimated for estimated, _ in pairs]
    share = 0.0
    if len(pairs) >= _FEWEST_FOR_A_SLOPE and max(estimates) >= _LEAST_SPREAD * min(estimates):
        first, second = np.triu_indices(len(pairs), 1)
        runs, rises = (np.array(values)[second] - np.array(values)[first] for values in (estimates, surplus))
        share = float(np.median(rises[runs != 0] / runs[runs != 0]))
    fixed = statistics.median(s - share * e for s, e in zip(surplus, estimates, strict=True))
    return Overhead(fixed, share, len(pairs))


class Limits:
    """Judges costs by the study's limits, the device's free memory, and the trials so far."""

    def __init__(self, config: StudyConfig, trials: Sequence[Trial], free_bytes: int | None) -> None:
        """`trials` is read anew at each judgement. `free_bytes` is what a worker's GPU had free, where there is one."""
        self._config = config
        self._trials = trials
        self._free_bytes = free_bytes
        self._fitted: dict[Bits, tuple[list[tuple[int, int]], Overhead]] = {}
        """The pairs, and what was fitted to them: each decision asks, and each slope between any two is weighed."""

    @property
    def room_bytes(self) -> int | None:
        """What the GPU had free for a training, where there is one."""
        return None if self._free_bytes is None else max(1, self._free_bytes - CONTEXT_BYTES)

    def has_ample_room(self, trial: Trial) -> bool:
        """Whether it can only have run out of memory because something else had taken it."""
        room = self.room_bytes
        return room is not None and trial.cost is not None and self._need_of(trial) <= _AMPLE_SHARE * room

    def overhead(self, bits: Bits) -> Overhead:
        """By trials on a base of that width, or by all while there are none."""
        pairs = measured_pairs(self._trials, bits) or measured_pairs(self._trials)
        if bits not in self._fitted or self._fitted[bits][0] != pairs:
            self._fitted[bits] = pairs, fit_overhead(pairs)
        return self._fitted[bits][1]

    def correct(self, cost: Cost, bits: Bits) -> Cost:
        """An estimated cost with what measurements taught; a measured one as it is."""
        if cost.vram_source == "measured":
            return cost
        corrected = self.overhead(bits).correct(cost.peak_vram_bytes)
        return replace(cost, corrected_vram_bytes=None if corrected == cost.peak_vram_bytes else corrected)

    def judge(self, trial: Trial) -> Judgement:
        """Of a trial whose cost is known and corrected."""
        cost = trial.cost
        assert cost is not None
        need = needed_bytes(cost)
        learned = "" if cost.corrected_vram_bytes is None else ", corrected by what was measured,"
        judgements = [Judgement(None, 0.0)]

        def limit(amount: float, most: float | None, rule: str) -> None:
            if most is not None and amount > most:
                judgements.append(Judgement(rule, amount / most - 1))

        most = self._config.max_vram_bytes
        limit(need, most, f"needs {_gib(need)}{learned} and --max-vram is {_gib(most or 0)}")
        room = self.room_bytes
        limit(need, room, f"needs {_gib(need)}{learned} and the GPU has {_gib(room or 0)} free for it")
        params = self._config.max_params
        count = cost.trainable_parameters
        limit(count, params, f"trains {count:,} parameters, and --max-params is {params or 0:,}")
        failed = self._least_that_ran_out(trial)
        if failed is not None:
            too_much = self._need_of(failed)
            rule = f"needs {_gib(need)}{learned} and trial {failed.number} ran out of memory with {_gib(too_much)}"
            limit(need, too_much - 1, rule)
        return max(judgements, key=lambda judgement: judgement.excess)

    def judge_measured(self, cost: Cost) -> str | None:
        """The rule that a trial breaks whose peak was estimated to fit, and measured not to; or None."""
        most, need = self._config.max_vram_bytes, needed_bytes(cost)
        if most is None or need <= most:
            return None
        return f"needs {_gib(need)}, as its first steps measured, and --max-vram is {_gib(most)}"

    def most(self) -> dict[str, float]:
        """What a configuration may cost at most, by objective, for choosing what to judge."""
        failed = self._least_that_ran_out()
        rooms = [
            self._config.max_vram_bytes,
            self.room_bytes,
            None if failed is None else self._need_of(failed) - 1,
        ]
        room = min((room for room in rooms if room is not None), default=None)
        params = self._config.max_params
        return {name: float(most) for name, most in {"vram": room, "params": params}.items() if most is not None}

    def _least_that_ran_out(self, but: Trial | None = None) -> Trial | None:
        """Of those that needed more than what fitted, on no smaller a GPU than today's."""
        failed = [
            trial
            for trial in self._trials
            if ran_out(trial) and trial.cost is not None and trial is not but and not self._has_more_room_than(trial)
        ]
        if not failed:
            # Mostly nothing has, and every decision asks.
            return None
        room = math.inf if self.room_bytes is None else self.room_bytes
        fitted = max((peak for _, peak in measured_pairs(self._trials) if peak <= room), default=0)
        return min((trial for trial in failed if self._need_of(trial) > fitted), key=self._need_of, default=None)

    def _has_more_room_than(self, trial: Trial) -> bool:
        had = trial.outcome.room_bytes if isinstance(trial.outcome, Failed) else None
        return had is not None and self.room_bytes is not None and self.room_bytes > _MORE_ROOM * had

    def _need_of(self, trial: Trial) -> int:
        """What a trial would have needed, had it fitted: its estimate with today's correction."""
        assert trial.cost is not None
        estimated = trial.cost.estimated_vram_bytes or trial.cost.peak_vram_bytes
        return max(self.overhead(trial.spec.bits).correct(estimated), trial.cost.peak_vram_bytes)


def needed_bytes(cost: Cost) -> int:
    """The best that is known of a peak: measured, else corrected, else estimated; training's or the evaluation's."""
    peak = cost.peak_vram_bytes
    if cost.vram_source == "estimated" and cost.corrected_vram_bytes is not None:
        peak = cost.corrected_vram_bytes
    # Scoring one example at a time can still need more, where examples to score are longer than those to train on.
    surplus = max(0, (cost.scoring_vram_bytes or 0) - (cost.estimated_vram_bytes or cost.peak_vram_bytes))
    return peak + surplus


def ran_out(trial: Trial) -> bool:
    """Whether it failed for want of memory, so that its peak is not known."""
    return isinstance(trial.outcome, Failed) and trial.outcome.reason == "out_of_memory"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
