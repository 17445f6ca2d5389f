"""The race of a study's trials: who is compared with whom. By what rule they are is in `racing.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.records import RungScore, Stopped
from autopeft.search.front import cost_vector
from autopeft.search.gain import sampling_variance
from autopeft.search.racing import Contender, LossCurve, RacingRule, Verdict, paired_gap
from autopeft.search.store import StudyStore, Trial


class Decision(NamedTuple):
    """A trial that is to change its state."""

    trial: Trial
    verdict: Verdict | None
    """What stops it; None for a stopped one that goes on after all."""


class _Rivals:
    """Those at one rung. Each of thousands is compared, mostly with those that no rule would let stop it."""

    def __init__(self, contenders: Sequence[Contender]) -> None:
        # What is in order is sorted faster.
        self._contenders = sorted(contenders, key=lambda each: each.loss)
        self._losses = np.array([each.loss for each in self._contenders])
        self._costs = np.array([each.costs for each in self._contenders])

    def find(self, contender: Contender) -> list[Contender]:
        """Who costs no more and has less loss, the least first."""
        may_stop = (self._losses < contender.loss) & (self._costs <= np.array(contender.costs)).all(axis=1)
        return [self._contenders[place] for place in np.flatnonzero(may_stop)]


class Race:
    """Tells which paused trials are stopped, and which stopped ones go on. It changes none of them."""

    def __init__(self, store: StudyStore, rule: RacingRule) -> None:
        self._store = store
        self._rule = rule
        self._losses: dict[str, npt.NDArray[np.float64] | None] = {}
        """By scores file: each is compared many times."""

    def judge_newcomer(self, newcomer: Trial) -> list[Decision]:
        """What is clearly beaten, now that one more trial was scored at a rung."""
        if newcomer.state == "complete":
            return self.judge_all() if self._rule.learn(self._loss_curves()) != self._rule else []
        field = self._find_field(newcomer.step)
        own = next(contender for trial, contender in field if trial is newcomer)
        everybody = [contender for _, contender in field]
        decisions = []
        for trial, contender in field:
            rivals = everybody if trial is newcomer else [own]
            if _stands(trial, contender) and (verdict := self.judge(contender, rivals)) is not None:
                decisions.append(Decision(trial, verdict))
        return decisions

    def judge_all(self) -> list[Decision]:
        """All paused trials beside all that were ever scored at their rungs, and the stopped ones anew: noise may cost
        time, but never a member of the front."""
        self._rule = self._rule.learn(self._loss_curves())
        decisions = []
        for step in self._store.config.rungs[:-1]:
            field = self._find_field(step)
            rivals = _Rivals([contender for _, contender in field])
            for trial, contender in field:
                may_revive = self._store.may_revive(trial) and trial.step == step
                if not _stands(trial, contender) and not may_revive:
                    continue
                verdict = self.judge(contender, rivals.find(contender))
                if may_revive == (verdict is None):
                    decisions.append(Decision(trial, verdict))
        return decisions

    def judge_beaten_by(self, failed: Trial) -> list[Decision]:
        """What a trial had stopped that is on no front now: stopped by another, or going on."""
        decisions = []
        for trial in self._store.trials:
            if not isinstance(trial.outcome, Stopped) or trial.outcome.rival != failed.number:
                continue
            if self._store.may_revive(trial):
                field = self._find_field(trial.step)
                own = next(contender for other, contender in field if other is trial)
                decisions.append(Decision(trial, self.judge(own, [contender for _, contender in field])))
        return decisions

    def judge(self, contender: Contender, rivals: Sequence[Contender]) -> Verdict | None:
        """`rivals` were scored at the contender's rung, which they may have left behind."""
        floor = self._store.config.majority_quality
        if self._is_generation:
            # The untrained base was scored on the same examples, so that beating it can be told by pairs.
            rivals = [rival for rival in rivals if self._beats_base(rival.losses)]
            floor = -math.inf
        progress = self._progress(contender.step)
        return self._rule.judge(contender, rivals, progress=progress, majority_quality=floor)

    def beats_floor(self, score: RungScore) -> bool:
        """Whether it is better than what no learning gives, by more than two standard errors."""
        if self._is_generation:
            return self._beats_base(self._read_losses(score.scores_file))
        return score.quality - self._store.config.majority_quality > 2 * math.sqrt(sampling_variance(score))

    def _beats_base(self, losses: npt.NDArray[np.float64] | None) -> bool:
        """Whether by more than two standard errors of the paired differences in loss."""
        baseline = self._store.baseline
        if losses is None or baseline is None or not baseline.rungs:
            return True
        base_losses = self._read_losses(baseline.rungs[-1].scores_file)
        if base_losses is None:
            return True
        gap, error = paired_gap(base_losses, losses)
        return gap > 2 * error

    def _find_field(self, step: int) -> list[tuple[Trial, Contender]]:
        """All that were ever scored at a rung, but for what failed since or measured too dear: on no front, it stops
        nobody."""
        objectives = self._store.config.objectives
        field = []
        for trial in self._store.trials:
            score = next((score for score in trial.rungs if score.step == step), None)
            if score is None or trial.state in ("failed", "refused"):
                continue
            assert trial.cost is not None
            contender = Contender(
                number=trial.number,
                step=step,
                costs=cost_vector(trial.cost, objectives),
                quality=score.quality,
                num_examples=score.num_examples,
                loss=score.loss,
                losses=self._read_losses(score.scores_file),
            )
            field.append((trial, contender))
        return field

    def _read_losses(self, scores_file: str) -> npt.NDArray[np.float64] | None:
        if scores_file not in self._losses:
            self._losses[scores_file] = self._store.read_losses(scores_file)
        return self._losses[scores_file]

    def _loss_curves(self) -> list[LossCurve]:
        return [{self._progress(s.step): s.loss for s in trial.rungs} for trial in self._store.trials if trial.rungs]

    def _progress(self, step: int) -> float:
        return step / self._store.config.rungs[-1]

    @property
    def _is_generation(self) -> bool:
        return self._store.config.task_kind == "generation"


def _stands(trial: Trial, contender: Contender) -> bool:
    """Whether a verdict can stop it: it waits at the very rung, and has not left it behind."""
    return trial.state == "paused" and trial.step == contender.step
