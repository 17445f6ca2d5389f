"""Chosen configurations for trainers. The table of targets; one file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autopeft.errors import ExportError, suggest_nearest
from autopeft.export.peft import export_to_peft
from autopeft.records import StudyRecord, TrialRecord

TARGETS: dict[str, Callable[[StudyRecord, TrialRecord, str, Path], list[Path]]] = {"peft": export_to_peft}
"""(study, trial, model, folder) -> files written. Each refuses what it cannot express before it writes anything."""


def find_trial(record: StudyRecord, pick: str) -> TrialRecord:
    """The trial a pick's name or a number means. Raises ExportError with what there is."""
    if pick.isdecimal():
        for trial in record.trials:
            if trial.number == int(pick):
                return trial
        raise ExportError(
            f"The study '{record.config.name}' has trials 0 to {len(record.trials) - 1}, but --pick is {pick}."
        )
    picks = {chosen.name: chosen.number for chosen in record.picks}
    if pick in picks:
        return next(trial for trial in record.trials if trial.number == picks[pick])
    if pick in ("best", "knee", "smallest"):
        raise ExportError(
            f"The study '{record.config.name}' has no '{pick}' yet: no trial has reached its full length. Go on with "
            f"autopeft resume {record.config.name}, or pick a trial by number."
        )
    raise ExportError(f"There is no pick '{pick}'. {suggest_nearest(pick, ['best', 'knee', 'smallest'])} Or a number.")


def export_trial(record: StudyRecord, trial: TrialRecord, *, model: str, target: str, out: Path) -> list[Path]:
    """Writes the configuration for `target` into the new folder `out`."""
    if target not in TARGETS:
        raise ExportError(f"There is no export target '{target}'. {suggest_nearest(target, TARGETS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"--out must be a new or empty folder, but '{out}' is not. Nothing was overwritten.")
    return TARGETS[target](record, trial, model, out)
