"""The files of a folder that is trained in: `training.yaml`, `result.json`, `local.json`.

The first two may be published. `local.json` says where model and rows lie on this machine, and never is.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from autopeft.errors import RecordError, suggest_nearest
from autopeft.methods import fill_settings
from autopeft.production.recipe import OWN, RECIPE_VERSION, Prediction, Recipe, check_recipe, to_plain, with_own_values
from autopeft.records import Inference, from_record, to_record
from autopeft.report.files import write_atomically

RECIPE_FILE = "training.yaml"
RESULT_FILE = "result.json"
LOCAL_FILE = "local.json"

SavedAs = Literal["peft", "transformers", "autopeft"]
_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Whether the finished training scores as the study predicted (two-sided z test, arXiv:2411.00640, section 4.1)."""

    split: Literal["test", "validation"]
    """Where both were measured: the search-validation split if the study never confirmed the trial."""
    difference: float
    """The training's quality less the study's."""
    standard_error: float
    """Of the difference: both standard errors, added in squares."""
    z: float
    agrees: bool
    """|z| is at most 1.96."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What a finished training folder says of itself: `result.json`."""

    task_name: str
    model: str
    scorer: str
    steps: int
    """Optimizer steps done."""
    best_step: int
    """The step whose weights were kept."""
    stopped_early: bool
    num_train: int
    num_validation: int
    num_test: int
    validation_quality: float | None
    """Of the kept weights; None where the split was trained on."""
    validation_loss: float | None
    test_quality: float
    test_standard_error: float
    """From the test examples alone; another seed would differ by more."""
    test_loss: float
    prediction: Prediction
    agreement: Agreement | None
    """None where the study measured nothing to compare with: other rows, or a part of the trial's length alone."""
    train_seconds: float
    """Wall seconds of all sessions, evaluations and checkpoints included."""
    peak_bytes: int | None
    """Allocated on the fullest GPU; None on CPU."""
    trainable_parameters: int
    head_parameters: int
    saved_as: SavedAs
    """What loads `adapter/`: plain peft, plain transformers (all weights), or autopeft (`backends/hf/saved.py`)."""
    adapter_bytes: int
    """Of the weight files in `adapter/`."""
    processes: int
    device: str
    scores_file: str
    """Per-example `test_losses` and `test_predictions` in the split's order, and `validation_` alike; in the folder."""
    scores_digest: str
    data_digest: str
    """Of all rows and their split; the study's is `provenance.task_digest`."""
    model_digest: str
    weights_digests: dict[str, str]
    """SHA-256 of the weight files in `adapter/`, by name."""
    autopeft: str
    packages: dict[str, str]
    finished_at: str
    """UTC, ISO 8601."""
    inference: Inference | None = dataclasses.field(default=None, metadata={"leave_out_default": True})
    """None where the trained model is in pieces on several devices."""
    schema_version: int = RECIPE_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlaces:
    """Where things lie on this machine; `local.json`, never published and never in a record."""

    model: str | None = None
    """What transformers loads: a folder, a hub id or `minilm`."""
    data_dir: str | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """The task's own data files: names in the recipe's task -> paths."""


# --- training.yaml

_HEAD = """\
# How to train the chosen configuration on the task's training rows. Read by autopeft train, which trains on the
# search-validation rows too with --all-rows; other trainers' files say the same."""
_SECTIONS = {
    "model": "What is trained, on what.",
    "steps": "How. The batch is the trial's, so its learning rate holds; the length is scaled to num_train rows.",
    "prediction": "What the study measured for it, and where it comes from.",
}
"""Comments of the file, by the field that they stand above."""


class _Dumper(yaml.SafeDumper):
    """Writes the task file's text as a block, to be read and edited as it is."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def write_recipe(recipe: Recipe, folder: Path) -> Path:
    """`training.yaml` in the folder, which is made if need be; whole or as it was."""
    record = to_plain(recipe)
    record = {"schema_version": record.pop("schema_version"), **record}
    lines = [_HEAD]
    for name, value in record.items():
        if name in _SECTIONS:
            lines += ["", f"# {_SECTIONS[name]}"]
        lines.append(yaml.dump({name: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True).rstrip("\n"))
    path = folder / RECIPE_FILE
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def read_recipe(folder: Path) -> Recipe:
    """Raises RecordError where `training.yaml` is missing, is not a recipe, or contradicts itself."""
    path = folder / RECIPE_FILE
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise RecordError(
            f"A folder to train from holds {RECIPE_FILE}, but '{folder}' does not. Write one with: autopeft export "
            f"STUDY --pick knee --to peft --out {folder}"
        ) from exc
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise RecordError(f"'{path}' must be readable YAML, but is not: {exc}.") from exc
    if not isinstance(data, dict):
        raise RecordError(f"'{path}' must hold keys and values such as steps: and learning_rate:, but does not.")
    names = {field.name for field in dataclasses.fields(Recipe)}
    for name in data:
        if name not in names:
            raise RecordError(f"'{path}' has the unknown key '{name}'. {suggest_nearest(str(name), names)}")
    recipe = with_own_values(from_record(Recipe, _complete_spec(data, path), f"'{path}'"))
    check_recipe(recipe, str(path))
    return dataclasses.replace(recipe, spec=fill_settings(recipe.spec))


_UNREAD = {
    "learning_rate": 0.0, "batch_size": 0, "max_steps": 0, "warmup_ratio": 0.0, "schedule": "linear",
    "weight_decay": 0.0, "seed": 0, "optimizer": "adamw",
}  # fmt: skip
"""Stands in a spec until `with_own_values`."""


def _complete_spec(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record with a whole spec. Older files have one, of which only the trial's length is read.

    Raises RecordError where somebody gave a newer one what nobody would read.
    """
    spec = data.get("spec")
    if not isinstance(spec, dict):
        return data
    if "trial_steps" not in data:
        data = {**data, "trial_steps": spec.get("max_steps"), "trial_warmup_ratio": spec.get("warmup_ratio")}
    elif twice := next((name for name in OWN if name in spec), None):
        own = {"max_steps": "steps", "warmup_ratio": "warmup_steps"}.get(twice, OWN[twice])
        raise RecordError(
            f"In '{path}' spec says method, settings, targets and bits alone, but has {twice}, too, which nothing "
            f"would come of. Take it out, and set {own} below instead."
        )
    return {**data, "spec": {**spec, **_UNREAD}}


# --- JSON


def write_result(result: TrainingResult, folder: Path) -> Path:
    """`result.json` in the folder, whole or not at all."""
    path = folder / RESULT_FILE
    write_atomically(path, json.dumps(to_record(result), indent=2) + "\n")
    return path


def read_result(folder: Path) -> TrainingResult:
    """Raises RecordError where the folder holds no finished training."""
    return read_json(
        folder / RESULT_FILE,
        TrainingResult,
        missing=f"A finished training holds {RESULT_FILE}, but '{folder}' does not. Train it, or let it finish: "
        "autopeft train STUDY --pick knee --out DIR goes on where it stopped.",
    )


def write_local(places: LocalPlaces, folder: Path) -> None:
    write_atomically(folder / LOCAL_FILE, json.dumps(to_record(places), indent=2) + "\n")


def read_local(folder: Path) -> LocalPlaces:
    """Empty where the folder has no `local.json`. Raises RecordError where it is broken."""
    path = folder / LOCAL_FILE
    return read_json(path, LocalPlaces, broken=" It can be deleted.") if path.is_file() else LocalPlaces()


def read_json(path: Path, kind: type[_Record], *, missing: str = "", broken: str = "") -> _Record:
    """The record in a file. Raises RecordError: with `missing` where there is no file, with what is wrong with it and
    `broken` where it cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise RecordError(missing or f"'{path}' must be a file, but there is none.") from exc
    except (OSError, ValueError) as exc:
        raise RecordError(f"'{path}' must be readable JSON, but is not: {exc}.{broken}") from exc
    return from_record(kind, data, f"'{path}'")


def name_base(path: Path, model: str | None) -> None:
    """Puts the base's public name into peft's adapter_config.json, where there is one, in place of the folder that it
    lay in; and names of modules in one order, which peft keeps in sets."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {
        k: sorted(v) if isinstance(v, list) and all(isinstance(i, str) for i in v) else v for k, v in config.items()
    }
    path.write_text(json.dumps(config | {"base_model_name_or_path": model}, indent=2) + "\n", encoding="utf-8")
