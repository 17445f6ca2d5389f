"""Chosen configurations for trainers. The table of targets; one file each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from autopeft.errors import ExportError, suggest_nearest
from autopeft.export import axolotl, llama_factory, ms_swift, peft, trainer, trl, unsloth
from autopeft.export.bundle import Bundle, make_bundle
from autopeft.export.files import Files, provenance, write_export
from autopeft.export.picks import find_trial
from autopeft.export.readme import write_readme
from autopeft.export.settings import Unsaid
from autopeft.export.target import Target
from autopeft.methods import METHODS, find_method
from autopeft.production.recipe import Recipe, make_recipe
from autopeft.records import StudyRecord, TrialRecord
from autopeft.report.cards import Way
from autopeft.report.files import check_new_folder
from autopeft.tasks.spec import TaskSpec, parse_task

TARGETS: dict[str, Target] = {
    "peft": peft.TARGET,
    "trainer": trainer.TARGET,
    "trl": trl.TARGET,
    "llama-factory": llama_factory.TARGET,
    "axolotl": axolotl.TARGET,
    "unsloth": unsloth.TARGET,
    "ms-swift": ms_swift.TARGET,
}
_BY_NEARNESS = ("trl", "llama-factory", "axolotl", "ms-swift", "unsloth", "trainer", "peft")
"""In which another target is looked for: trainers with a file of settings first. Nearest to peft's own file is the
script on plain peft."""


class Exported(NamedTuple):
    files: list[Path]
    commands: tuple[str, ...]
    """To be run inside of the folder, in this order."""


def refuse_export(target: str, recipe: Recipe, task: TaskSpec) -> str | None:
    """Why a target cannot say a configuration, or None."""
    try:
        return TARGETS[target].refuse(recipe, task)
    except Unsaid as exc:
        return str(exc)


def find_nearest(recipe: Recipe, task: TaskSpec, *, but: str) -> str | None:
    """Another target that can say the configuration, as far as can be told without the model."""
    order = ("trainer", *_BY_NEARNESS) if but == "peft" else _BY_NEARNESS
    others = (name for name in order if name != but)
    return next((name for name in others if refuse_export(name, recipe, task) is None), None)


def find_way(record: StudyRecord, trial: TrialRecord) -> Way:
    """For the report: peft where it can say the trial, else the stand-alone script, else the nearest that can."""
    if trial.spec.method not in METHODS:
        # Of a distribution that is not installed here.
        return Way("peft")
    task = parse_task(record.config.task, record.config.task_name)
    recipe = make_recipe(record, trial, pick=str(trial.number), num_train=record.provenance.num_train)
    reason = refuse_export("peft", recipe, task)
    if reason is None:
        return Way("peft")
    return Way(find_nearest(recipe, task, but="peft"), reason)


def export_trial(
    record: StudyRecord,
    trial: TrialRecord,
    *,
    model: str,
    target: str,
    out: Path,
    pick: str | None = None,
    data_dir: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
) -> Exported:
    """Writes everything that `target` needs to train the trial into the new folder `out`.

    Its training rows are the study's: those of search-validation stay apart. `model` and `data_dir` say where model
    and rows lie on this machine. Without `epochs` or `steps` the length is the recipe's own
    (`production.recipe.lay_out`). Raises ExportError where the target cannot say it, and writes nothing.
    """
    if target not in TARGETS:
        raise ExportError(f"There is no export target '{target}'. {suggest_nearest(target, TARGETS)}")
    check_new_folder(out)
    pick = pick or str(trial.number)
    task = parse_task(record.config.task, record.config.task_name)
    # Refused before rows and model are read, of which the latter may have to be fetched.
    draft = make_recipe(
        record, trial, pick=pick, num_train=record.provenance.num_train, epochs=epochs, steps=steps, model=model
    )
    reason = refuse_export(target, draft, task)
    if reason is not None:
        raise _refusal(target, draft, task, reason)
    bundle = make_bundle(record, trial, pick=pick, model=model, data_dir=data_dir, epochs=epochs, steps=steps)
    return write_bundle(bundle, target, out, model=model, data_dir=data_dir)


def write_bundle(bundle: Bundle, target: str, out: Path, *, model: str, data_dir: str | None) -> Exported:
    """The files of one target. Raises ExportError where the model or the rows are what it cannot say."""
    try:
        export = TARGETS[target].write(bundle)
    except Unsaid as exc:
        raise _refusal(target, bundle.recipe, bundle.task, str(exc)) from exc
    files: Files = {
        "README.md": write_readme(bundle, TARGETS[target], export),
        "provenance.json": provenance(bundle, export.files, target=target, checked_with=TARGETS[target].package),
        **export.files,
    }
    return Exported(write_export(files, bundle, out, model=model, data_dir=data_dir), export.commands)


def _refusal(target: str, recipe: Recipe, task: TaskSpec, reason: str) -> ExportError:
    nearest = find_nearest(recipe, task, but=target)
    title = find_method(recipe.spec.method).title
    remedy = (
        f"The nearest target that can: --to {nearest}."
        if nearest
        else f"No target can; train it with: autopeft train {recipe.study} --pick {recipe.trial} --out DIR."
    )
    return ExportError(
        f"Trial {recipe.trial} ({title}, {recipe.spec.bits} bits, {task.kind}) cannot be exported to {target}: "
        f"{reason} {remedy}"
    )


__all__ = [
    "TARGETS",
    "Exported",
    "Target",
    "export_trial",
    "find_nearest",
    "find_trial",
    "find_way",
    "refuse_export",
    "write_bundle",
]
