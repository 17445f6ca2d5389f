"""How well estimates of memory agreed with what was measured, in a sentence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from autopeft.records import Failed, StudyRecord, TrialRecord
from autopeft.report.scores import all_trials
from autopeft.wording import say_count


def describe_memory(study: StudyRecord) -> str:
    """Of the estimates, and of what earlier trials' measurements made of them."""
    trials = all_trials(study)
    measured = [trial for trial in trials if is_measured(trial)]
    failed = sum(isinstance(t.outcome, Failed) and t.outcome.reason == "out_of_memory" for t in trials)
    ran_out = f"; {failed} ran out of memory" if failed else ""
    if not measured:
        return "peaks are estimated, by one training step on tensors without data; none was measured" + ran_out
    text = f"{say_count(len(measured), 'peak')} measured; estimates were off by {_spread(estimate_errors(measured))}"
    corrected = [trial for trial in measured if trial.cost is not None and trial.cost.corrected_vram_bytes is not None]
    if corrected:
        text += (
            f", and by {_spread(correction_errors(corrected))} once corrected by the trials before "
            f"({say_count(len(corrected), 'trial')})"
        )
    return text + ran_out


def is_measured(trial: TrialRecord) -> bool:
    """Whether both an estimate and the peak of whole steps are there."""
    ran_out = isinstance(trial.outcome, Failed) and trial.outcome.reason == "out_of_memory"
    cost = trial.cost
    return not ran_out and cost is not None and cost.vram_source == "measured" and cost.estimated_vram_bytes is not None


def estimate_errors(trials: Sequence[TrialRecord]) -> list[float]:
    costs = [trial.cost for trial in trials if trial.cost is not None]
    return [cost.estimated_vram_bytes / cost.peak_vram_bytes - 1 for cost in costs if cost.estimated_vram_bytes]


def correction_errors(trials: Sequence[TrialRecord]) -> list[float]:
    costs = [trial.cost for trial in trials if trial.cost is not None]
    return [cost.corrected_vram_bytes / cost.peak_vram_bytes - 1 for cost in costs if cost.corrected_vram_bytes]


def _spread(errors: Sequence[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"{statistics.median(sizes):.1%} in the median, {max(sizes):.1%} at worst"
