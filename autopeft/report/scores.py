"""What the tables and figures read out of records: scores with their spread, and who dominates whom."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from autopeft.records import Inference, StudyRecord, TrialRecord
from autopeft.report.words import format_margin, format_quality, is_fraction


class Score(NamedTuple):
    """A mean quality and how far to trust it."""

    mean: float
    spread: float | None
    """Standard deviation over seeds; with one seed the standard error over the examples; None where unknown."""
    num_seeds: int

    def text(self, scorer: str) -> str:
        """`84.2% ± 0.6`."""
        mean = format_quality(self.mean, scorer)
        return mean if self.spread is None else f"{mean} ± {format_margin(self.spread, scorer)}"

    def basis(self) -> str:
        """What the spread is of."""
        return f"sd over {self.num_seeds} seeds" if self.num_seeds > 1 else "one seed, standard error"


def validation_score(trial: TrialRecord, scorer: str) -> Score | None:
    """Search-validation quality at the last rung reached, over all seeds; None before the first rung."""
    if not trial.rungs:
        return None
    last = trial.rungs[-1]
    values = [last.quality, *(c.quality for c in trial.confirmations)]
    return summarize(values, last.num_examples, scorer, last.quality_sd)


def held_out_score(trial: TrialRecord, scorer: str) -> Score | None:
    """Test quality over the confirmed seeds; None where none was confirmed."""
    if not trial.confirmations:
        return None
    examples = min(c.num_test_examples for c in trial.confirmations)
    values = [c.test_quality for c in trial.confirmations]
    return summarize(values, examples, scorer, trial.confirmations[0].test_quality_sd)


def serving_seconds(trial: TrialRecord) -> float | None:
    """Latency of one example alone, merged where the method merges: the objective's, else the first confirmation's."""
    if trial.cost is not None and trial.cost.latency_seconds is not None:
        return trial.cost.latency_seconds
    inference = find_inference(trial)
    return None if inference is None else (inference.merged or inference.unmerged).single_seconds


def unmerged_seconds(trial: TrialRecord) -> float | None:
    """The same with the adapter beside its base, where that is not how it is served; None where it was not measured."""
    inference = find_inference(trial)
    return None if inference is None or inference.merged is None else inference.unmerged.single_seconds


def find_inference(trial: TrialRecord) -> Inference | None:
    """The first confirmation's."""
    return next((c.inference for c in trial.confirmations if c.inference is not None), None)


def summarize(values: Sequence[float], num_examples: int, scorer: str, example_sd: float | None = None) -> Score:
    """`example_sd` is the spread over examples, where it was recorded."""
    mean = statistics.fmean(values)
    if len(values) > 1:
        return Score(mean, statistics.stdev(values), len(values))
    return Score(mean, standard_error(mean, num_examples, scorer, example_sd), 1)


def standard_error(quality: float, num_examples: int, scorer: str, example_sd: float | None = None) -> float | None:
    """Of one run's quality, from the finite number of examples.

    Where their scores' spread is known, that over sqrt(n); a spread of 0, which a model has that gives everything one
    class, is not certain (as in `search/gain.py`). Binomial for shares: sqrt(q (1 - q) / n), an approximation
    for F1. For correlations (1 - r^2) / sqrt(n - 1), the large-sample value for Pearson's r, of which Matthews'
    coefficient is the binary case.
    """
    if num_examples < 2 or not math.isfinite(quality):
        return None
    if example_sd is not None:
        return (example_sd or 1 / math.sqrt(num_examples)) / math.sqrt(num_examples)
    if is_fraction(scorer):
        return math.sqrt(max(quality * (1 - quality), 0.0) / num_examples)
    return max(1 - quality**2, 0.0) / math.sqrt(num_examples - 1) if abs(quality) <= 1 else None


def all_trials(study: StudyRecord) -> list[TrialRecord]:
    """Trials by number, the trained-head baseline first where it is not one of them.

    The untrained base of a generation task is no trial: it is a line to compare with.
    """
    trials = sorted(study.trials, key=lambda trial: trial.number)
    if study.config.task_kind == "generation":
        return trials
    if study.baseline is not None and all(trial.number != study.baseline.number for trial in trials):
        return [study.baseline, *trials]
    return trials


def undominated(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """For each point, whether no other is at least as low everywhere and lower somewhere."""
    kept: list[int] = []
    # Only what sorts before a point dominates it, and of that one on the front if any: few comparisons each.
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if not any(_dominates(points[other], points[place]) for other in kept):
            kept.append(place)
    on_front = set(kept)
    return [place in on_front for place in range(len(points))]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def vram_title(trials: Sequence[TrialRecord]) -> str:
    """`Peak VRAM, estimated` or `..., measured` where all values are one of them; else each value must say it."""
    sources = {trial.cost.vram_source for trial in trials if trial.cost is not None}
    return f"Peak VRAM, {sources.pop()}" if len(sources) == 1 else "Peak VRAM"
