"""What production training needs to know of a chosen trial, for every trainer.

A trial is short and sees a part of the rows. Its recipe keeps what its score depends on and stretches the rest:

- the effective batch stays the trial's, so that its learning rate stays right;
- there are as many steps as the epochs over the training rows need, but no fewer than the trial took;
- warm-up keeps its share of them, and the schedule is laid out over the new length.

No path of a machine is in it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from autopeft.errors import RecordError, SpecError
from autopeft.methods import check_spec, fill_settings
from autopeft.records import (
    Bits,
    Cost,
    Optimizer,
    Provenance,
    StudyRecord,
    TrialRecord,
    TrialSpec,
    digest_json,
    to_record,
)
from autopeft.wording import say_count

RECIPE_VERSION = 1
"""Raised when older code would misread `training.yaml`."""
DEFAULT_EPOCHS = 3.0
MAX_GRAD_NORM = 1.0
"""What trials clip gradients to (`backends/hf/steps.py`)."""

Schedule = Literal["linear", "cosine", "constant", "cosine_with_restarts"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the study measured for this configuration."""

    scorer: str
    validation_quality: float | None
    """On the search-validation split, mean over seeds; None where it reached no rung."""
    validation_sd: float | None
    """Between seeds; None with one seed."""
    num_seeds: int
    num_validation: int
    test_quality: float | None
    """On the test split, mean over the confirmed seeds; None where it was not confirmed."""
    test_sd: float | None
    """Between seeds; None with fewer than two."""
    num_confirmed: int
    num_test: int
    steps: int | None = dataclasses.field(default=None, metadata={"leave_out_default": True})
    """Optimizer steps after which it was scored, fewer than the trial's full length where it was stopped early; None
    before its first score, and in older files, which do not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what production training does, and where it comes from."""

    model: str
    """Base model: a hub id, `minilm`, or `local:` and a folder's name."""
    model_digest: str
    """Of the base's weights as the study had them; `` where it did not know them."""
    task_name: str
    task: str
    """The task file's text. Its own data files are named without their folder."""
    split_seed: int
    """With the task's rows it decides train, search-validation and test."""
    device_kind: Literal["cpu", "cuda"]
    """Where the trial was trained."""
    spec: TrialSpec
    """The trial's: method, settings, targets and bits. Of what is in `OWN` the recipe's fields alone count, and
    `training.yaml` has nothing else."""
    trial_steps: int
    """Its full length."""
    trial_warmup_ratio: float
    trial_num_train: int
    """Training rows that the trial drew its batches from."""
    num_train: int
    """Training rows that the steps below are laid out for."""

    steps: int
    """Optimizer steps."""
    epochs: float
    """How often the steps see each row."""
    warmup_steps: int
    schedule: Schedule
    num_cycles: int
    """Cosines in the schedule `cosine_with_restarts`; 1 in every other."""
    effective_batch: int
    """Rows of an optimizer step, over all processes and micro-batches."""
    micro_batch: int
    """Rows of one forward pass, on one process."""
    gradient_accumulation: int
    """Forward passes of an optimizer step, on one process: effective over micro batch."""
    learning_rate: float
    """At its highest."""
    weight_decay: float
    max_grad_norm: float
    optimizer: Optimizer
    precision: Precision
    """`bfloat16`: autocast, while what trains is kept in float32."""
    checkpoint_activations: bool
    seed: int
    pretrained: str | None = dataclasses.field(default=None, metadata={"leave_out_default": True})
    """Digest of the pre-trained adapter that it begins with (`--stage pretrain`); None where there is none."""

    prediction: Prediction
    cost: Cost | None
    study: str
    study_uid: str
    trial: int
    pick: str
    """As it was asked for: best, knee, smallest, a number, or conditions."""
    provenance: Provenance
    schema_version: int = RECIPE_VERSION

    def training_spec(self) -> TrialSpec:
        """The configuration as methods and builders read it, with the production length in place of the trial's.

        Its schedule is for `learning_rate_at` alone, which knows restarts too.
        """
        return dataclasses.replace(
            self.spec,
            bits=self.bits,
            learning_rate=self.learning_rate,
            batch_size=self.effective_batch,
            max_steps=self.steps,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            seed=self.seed,
        )

    @property
    def trains_on(self) -> Literal["cpu", "cuda"]:
        """Wherever the study was made: bfloat16 is for GPUs, and float32 for CPUs (`session.open_session`)."""
        return "cuda" if self.precision == "bfloat16" else "cpu"

    @property
    def bits(self) -> Bits:
        """Of the base's weights as it is trained on: unquantized they have 16 on GPUs, and 32 on CPUs."""
        return 32 if self.spec.bits == 16 and self.trains_on == "cpu" else self.spec.bits

    @property
    def measured_steps(self) -> int:
        """After which the study scored it; older files are taken to be of its full length."""
        return self.prediction.steps or self.trial_steps

    def say_measured_steps(self) -> str:
        """`400 steps`, or `50 of 400 steps` of a trial that was stopped early."""
        part = f"{self.measured_steps:,} of " if self.measured_steps < self.trial_steps else ""
        return f"{part}{say_count(self.trial_steps, 'step')}"

    @property
    def scoring_batch(self) -> int:
        """Rows at a time that are scored, on one process. Without activations kept for a backward pass, twice the
        micro-batch mostly needs less memory; the study knows better where it has estimated that."""
        known = self.cost.scoring_batch_size if self.cost is not None else None
        return min(2 * self.micro_batch, known or 2 * self.micro_batch)

    def key(self) -> str:
        """Identity of the weights that it leads to on one machine: checkpoints of another key are not to be resumed."""
        record = to_record(with_own_values(self))
        return digest_json({name: record.get(name) for name in DECISIVE})


OWN = {
    "learning_rate": "learning_rate", "batch_size": "effective_batch", "max_steps": "trial_steps",
    "warmup_ratio": "trial_warmup_ratio", "schedule": "schedule", "weight_decay": "weight_decay", "seed": "seed",
    "optimizer": "optimizer",
}  # fmt: skip
"""Fields of a trial's spec -> those of a recipe that say the same, or what took its place."""


def with_own_values(recipe: Recipe) -> Recipe:
    """The recipe with its spec as they say it; of schedules, a trial knows no restarts."""
    values = {name: getattr(recipe, own) for name, own in OWN.items()}
    if recipe.schedule == "cosine_with_restarts":
        values["schedule"] = "cosine"
    return dataclasses.replace(recipe, spec=dataclasses.replace(recipe.spec, **values))


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """Its record, in which everything is said once: what is said twice can be edited where nobody reads it."""
    record: dict[str, Any] = to_record(recipe)
    return record | {"spec": {name: value for name, value in record["spec"].items() if name not in OWN}}


DECISIVE = tuple(
    field.name
    for field in dataclasses.fields(Recipe)
    if field.name
    not in (
        "prediction", "cost", "study", "study_uid", "trial", "pick", "provenance", "schema_version", "epochs",
        "trial_steps", "trial_warmup_ratio",
    )
)  # fmt: skip
"""Fields of a recipe that decide the weights; the others say where it comes from, or are in its spec."""


# --- from a trial


def make_recipe(
    record: StudyRecord,
    trial: TrialRecord,
    *,
    pick: str,
    num_train: int,
    epochs: float | None = None,
    steps: int | None = None,
    model: str | None = None,
) -> Recipe:
    """The recipe of a study's trial for `num_train` rows.

    `steps=trial.spec.max_steps` is the trial itself. `model` is the base as this machine names it, which tells a
    folder from a hub id; None takes the study's word. Raises SpecError for a length that cannot be.
    """
    spec, config = fill_settings(trial.spec), record.config
    recipe = Recipe(
        model=name_model(model or config.model),
        model_digest=record.provenance.model_digest,
        task_name=config.task_name,
        task=make_task_portable(config.task),
        split_seed=config.seed,
        device_kind=config.device_kind,
        spec=spec,
        trial_steps=spec.max_steps,
        trial_warmup_ratio=spec.warmup_ratio,
        trial_num_train=record.provenance.num_train,
        num_train=num_train,
        steps=spec.max_steps,
        epochs=1.0,
        warmup_steps=math.ceil(spec.warmup_ratio * spec.max_steps),
        schedule=spec.schedule,
        num_cycles=1,
        effective_batch=spec.batch_size,
        micro_batch=spec.batch_size,
        gradient_accumulation=1,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        optimizer=spec.optimizer,
        precision="bfloat16" if config.device_kind == "cuda" else "float32",
        checkpoint_activations=False,
        seed=spec.seed,
        prediction=_predict(record, trial),
        cost=trial.cost,
        study=config.name,
        study_uid=record.uid,
        trial=trial.number,
        pick=pick,
        provenance=record.provenance,
    )
    return lay_out(recipe, num_train=num_train, epochs=epochs, steps=steps)


def lay_out(recipe: Recipe, *, num_train: int, epochs: float | None = None, steps: int | None = None) -> Recipe:
    """The recipe with its length for `num_train` rows; warm-up keeps its share, the batch stays.

    Steps or epochs that are given are taken as they are. Without either it is three epochs, but no fewer steps than the
    trial took: what was chosen was chosen at that length. Raises SpecError where they cannot be.
    """
    if steps is not None and epochs is not None:
        raise SpecError(f"A training's length is given in steps or in epochs, but was given as {steps} and {epochs:g}.")
    if num_train < 1:
        raise SpecError(f"Training needs at least one row, but there are {num_train}.")
    if steps is None:
        if epochs is not None and not (epochs > 0 and math.isfinite(epochs)):
            raise SpecError(f"epochs must be above zero, but is {epochs:g}.")
        fewest = 1 if epochs is not None else recipe.trial_steps
        steps = max(fewest, math.ceil((epochs or DEFAULT_EPOCHS) * num_train / recipe.effective_batch))
    if steps < 1:
        raise SpecError(f"steps must be at least 1, but is {steps}.")
    warmup_steps = math.ceil(recipe.trial_warmup_ratio * steps)
    if recipe.warmup_steps != math.ceil(recipe.trial_warmup_ratio * recipe.steps):
        # It was edited. In whole numbers, so that the same length gives the same again.
        warmup_steps = -(-recipe.warmup_steps * steps // recipe.steps)
    return dataclasses.replace(
        recipe,
        num_train=num_train,
        steps=steps,
        epochs=_count_epochs(steps, recipe.effective_batch, num_train),
        warmup_steps=warmup_steps,
    )


def _count_epochs(steps: int, batch: int, num_train: int) -> float:
    return round(steps * batch / num_train, 4)


def with_batch(recipe: Recipe, *, effective: int | None = None, micro: int | None = None) -> Recipe:
    """The recipe with another effective or micro batch. Lay it out again: the steps of an epoch change.

    A new effective batch changes the gradient's noise. Adam keeps its course when the learning rate moves with the
    square root of the batch (arXiv:2205.10287), which is what is done here. Raises SpecError where they do not divide.
    """
    if effective is not None:
        if effective < 1:
            raise SpecError(f"The effective batch must be at least 1, but is {effective}.")
        scale = math.sqrt(effective / recipe.effective_batch)
        if micro is None:
            # The largest that was known to fit and divides.
            micro = max(size for size in range(1, min(recipe.micro_batch, effective) + 1) if effective % size == 0)
        recipe = dataclasses.replace(
            recipe, effective_batch=effective, learning_rate=recipe.learning_rate * scale, micro_batch=micro
        )
    if micro is not None:
        if micro < 1 or recipe.effective_batch % micro:
            raise SpecError(
                f"The effective batch is made of equal micro-batches, but {recipe.effective_batch} is no multiple of "
                f"{micro}. Choose a divisor of it."
            )
        accumulation = recipe.effective_batch // micro
        recipe = dataclasses.replace(recipe, micro_batch=micro, gradient_accumulation=accumulation)
    return recipe


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises RecordError where values that somebody may have edited do not fit each other."""
    check_spec(fill_settings(recipe.spec))
    if recipe.micro_batch * recipe.gradient_accumulation != recipe.effective_batch:
        raise RecordError(
            f"In {where} effective_batch must be micro_batch times gradient_accumulation, but {recipe.effective_batch} "
            f"is not {recipe.micro_batch} x {recipe.gradient_accumulation}."
        )
    for name in ("steps", "trial_steps", "num_train", "effective_batch", "micro_batch", "learning_rate", "num_cycles"):
        if not getattr(recipe, name) > 0:
            raise RecordError(f"In {where} {name} must be above zero, but is {getattr(recipe, name)}.")
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed"):
        if getattr(recipe, name) < 0:
            raise RecordError(f"In {where} {name} must not be negative, but is {getattr(recipe, name)}.")
    if recipe.warmup_steps > recipe.steps:
        raise RecordError(f"In {where} warm-up takes {recipe.warmup_steps} of only {recipe.steps} steps. Shorten it.")
    epochs = _count_epochs(recipe.steps, recipe.effective_batch, recipe.num_train)
    if abs(recipe.epochs - epochs) > 1e-3 * epochs:
        steps = math.ceil(recipe.epochs * recipe.num_train / recipe.effective_batch)
        raise RecordError(
            f"In {where} {recipe.steps} steps of {recipe.effective_batch} rows are {epochs:g} epochs of "
            f"{recipe.num_train}, but epochs is {recipe.epochs:g}. Set epochs to {epochs:g}, or steps to {steps}."
        )
    if recipe.num_cycles > 1 and recipe.schedule != "cosine_with_restarts":
        raise RecordError(
            f"In {where} num_cycles is {recipe.num_cycles}, but the schedule '{recipe.schedule}' has no cycles. Set "
            "schedule: cosine_with_restarts, or num_cycles: 1."
        )


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Of the step that leads from `step` to `step + 1`: linear warm-up, then the schedule down to zero.

    The same as a trial's, and cosine with hard restarts beside it (arXiv:1608.03983 with equal periods).
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.learning_rate
    progress = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    if recipe.schedule == "linear":
        return recipe.learning_rate * (1 - progress)
    if recipe.schedule == "cosine_with_restarts":
        progress = (progress * recipe.num_cycles) % 1.0
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def name_model(model: str) -> str:
    """A model's name for records: a folder becomes `local:` and its last part; hub ids and `minilm` stay."""
    return f"local:{Path(model).resolve().name}" if Path(model).is_dir() else model


def make_task_portable(text: str) -> str:
    """A task file's text whose own data files are named without their folders."""
    data = _read_task(text)
    names = _name_files(data)
    if not names:
        return text
    files = {key: names.get(key, value) for key, value in data["files"].items()}
    return yaml.safe_dump(data | {"files": files}, sort_keys=False, allow_unicode=True)


def find_task_files(text: str) -> dict[str, str]:
    """The data files of a task file's text: names in the portable text -> names in this one."""
    data = _read_task(text)
    return {name: data["files"][key] for key, name in _name_files(data).items()}


def _read_task(text: str) -> dict[str, Any]:
    data = yaml.safe_load(text)
    return data if isinstance(data, dict) else {}


def _name_files(data: dict[str, Any]) -> dict[str, str]:
    """`train` and `test` -> the last parts of their paths, told apart where they are alike."""
    files = data.get("files")
    paths = {key: Path(path) for key, path in files.items() if isinstance(path, str)} if isinstance(files, dict) else {}
    names = [path.name for path in paths.values()]
    return {key: path.name if names.count(path.name) == 1 else f"{key}-{path.name}" for key, path in paths.items()}


def _predict(record: StudyRecord, trial: TrialRecord) -> Prediction:
    qualities = [score.quality for score in trial.rungs[-1:]] + [c.quality for c in trial.confirmations]
    tests = [confirmation.test_quality for confirmation in trial.confirmations]
    return Prediction(
        scorer=record.config.scorer,
        validation_quality=trial.quality,
        validation_sd=_spread(qualities),
        num_seeds=len(qualities),
        num_validation=record.provenance.num_validation,
        test_quality=trial.test_quality,
        test_sd=_spread(tests),
        num_confirmed=len(tests),
        num_test=record.provenance.num_test,
        # Confirmations are of full length.
        steps=trial.spec.max_steps if tests else trial.rungs[-1].step if trial.rungs else None,
    )


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
