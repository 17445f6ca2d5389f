"""What a reader must know about how a search ended, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autopeft.records import FailedConfirmation, StudyConfig
from autopeft.search.store import Trial
from autopeft.wording import say_count


class Ending(NamedTuple):
    """How a search ended."""

    beats_floor: bool
    """Whether any complete trial is clearly better than what no learning gives."""
    num_unconfirmed: int
    """Confirmations that were planned and did not fit."""
    early_gain: float | None
    """What the rest of the budget was expected to add to the hypervolume, as a share of it, where the search ended
    early because that was too little."""
    overrun_seconds: float
    """Wall seconds beyond the budget; 0 or less where it was kept."""
    found_nothing_new: bool
    """Whether the sampler had nothing left before the budget ended."""


def conclude(config: StudyConfig, trials: Sequence[Trial], ending: Ending) -> list[str]:
    notes = []
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        notes.append(
            "The budget was too small: no trial reached its full length, so nothing can be recommended. Give a "
            "larger --budget or a smaller --max-steps."
        )
    elif len(complete) < 3:
        count = say_count(len(complete), "trial reached its full length", "trials reached their full length")
        notes.append(f"The budget was small: only {count}.")
    if complete and not ending.beats_floor:
        is_generation = config.task_kind == "generation"
        floor = "the untrained base" if is_generation else "always answering the most frequent label"
        notes.append(
            f"No trial clearly beats {floor}, so the picks mean nothing yet. Give trials more steps (--max-steps), "
            "or a stronger --model."
        )
    if complete and not any(trial.confirmations for trial in complete) and config.confirm_seeds:
        why = " within the budget" if ending.num_unconfirmed else ", every such training ended without a score"
        notes.append(f"No finalist could be confirmed with another seed{why}: there are no test scores.")
    elif ending.num_unconfirmed:
        count = say_count(ending.num_unconfirmed, "planned confirmation")
        notes.append(f"{count} did not fit into the budget.")
    notes += [say_failed(trial, failed) for trial in complete for failed in trial.failed_confirmations]
    if ending.early_gain is not None:
        notes.append(
            f"The search was ended early: the rest of its budget was expected to enlarge the front's hypervolume "
            f"by {ending.early_gain:.2%}, less than --stop-when-gain-below {config.least_gain:.2%}. To go on "
            f"all the same: autopeft resume {config.name}."
        )
    if ending.overrun_seconds > 0:
        notes.append(
            f"The budget was overrun by {ending.overrun_seconds:.0f} s of wall time, the end of the last stretch."
        )
    if ending.found_nothing_new:
        notes.append("The sampler found nothing new in the space that fits before the budget ended.")
    return notes


def say_failed(trial: Trial, failed: FailedConfirmation) -> str:
    so = " So it is not picked." if failed.reason == "diverged" else ""
    return (
        f"The confirmation of trial {trial.number} with seed {failed.seed} ended without a score: {failed.reason}, "
        f"{failed.detail}.{so}"
    )
