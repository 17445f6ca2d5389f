"""What is left of a training: the weights in the form that the plainest library loads, and the result."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers

import autopeft
from autopeft.backends.hf.base_model import BaseModel, digest_file, load_base, resolve_model
from autopeft.backends.hf.build import ParameterCount, build_trial_model, trainable_parameters
from autopeft.backends.hf.data import TaskData
from autopeft.backends.hf.saved import save_adapter, save_trained
from autopeft.backends.hf.steps import SplitScores
from autopeft.backends.hf.trial import digest_weights, write_whole
from autopeft.methods import find_method
from autopeft.production import checkpoints
from autopeft.production.agreement import compare, estimate_standard_error
from autopeft.production.checkpoints import Evaluation
from autopeft.production.files import SavedAs, TrainingResult, name_base
from autopeft.production.latency import describe_machine
from autopeft.production.layout import complete_folder
from autopeft.production.recipe import Recipe
from autopeft.production.session import is_sharded
from autopeft.tasks.scorers import score_predictions
from autopeft.tasks.spec import TaskSpec

ADAPTER = "adapter"
_SCORES = "scores.npz"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


class Built(NamedTuple):
    model: Any
    base: BaseModel | None
    """What it shares its weights with; None where it has weights of its own."""
    head: tuple[str, ...]
    initial: dict[str, torch.Tensor] | None
    """The adapter that it was built with, where it took a part of the base's weights."""
    parameters: ParameterCount
    """Of what trains, the whole of it: FSDP leaves a process with its part."""


def save_weights(
    built: Built, recipe: Recipe, task: TaskSpec, tokenizer: Any, out: Path, model: str, step: int
) -> SavedAs:
    """`adapter/`, in the form that the plainest library loads. `step` is the checkpoint's with the kept weights."""
    folder = out / ADAPTER
    spec = recipe.training_spec()
    trained = built.model
    if is_sharded():
        # The model's parameters are in pieces; whole ones are in the checkpoint.
        base = load_base(model, num_labels=task.num_labels, bits=spec.bits, device="cpu")
        trained = build_trial_model(base, spec)
        state = checkpoints.read_trained(out, step)["trainable"]
        with torch.no_grad():
            for name, parameter in trainable_parameters(trained).items():
                parameter.copy_(state[name])
    folder.mkdir(parents=True, exist_ok=True)
    saved_as: SavedAs = "autopeft"
    if isinstance(trained, peft.PeftModel):
        save_adapter(trained, spec, folder, initial=built.initial)
        name_base(folder / "adapter_config.json", recipe.model)
        # peft's card names the folder that the base was loaded from.
        (folder / "README.md").unlink(missing_ok=True)
        saved_as = "peft"
    elif find_method(spec.method).name == "full":
        if task.kind == "generation":
            trained.generation_config = _make_generation_config(trained, tokenizer, model)
        trained.save_pretrained(folder)
        saved_as = "transformers"
    else:
        save_trained(trained, spec, folder)
    complete_folder(folder, tokenizer, model)
    return saved_as


def _make_generation_config(trained: Any, tokenizer: Any, model: str) -> transformers.GenerationConfig:
    """The base's own, which scoring left aside, and the end of sequence that was trained: libraries read it there
    alone. Of settings that transformers would refuse to write nothing is kept."""
    try:
        config = transformers.GenerationConfig.from_pretrained(resolve_model(model))
        config.validate(strict=True)
    except (OSError, ValueError):
        config = transformers.GenerationConfig.from_model_config(trained.config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    return config


def make_result(
    recipe: Recipe,
    task: TaskSpec,
    data: TaskData,
    out: Path,
    *,
    model: str,
    test: SplitScores,
    validation: SplitScores | None,
    saved_as: SavedAs,
    steps: int,
    best: Evaluation | None,
    num_train: int,
    seconds: float,
    peak: int | None,
    built: Built,
    processes: int,
    device: str,
) -> TrainingResult:
    arrays: dict[str, Any] = {"test_losses": test.losses, "test_predictions": test.predictions}
    quality = score_predictions(task.scorer, data.test.labels, test.predictions)
    error = estimate_standard_error(task.scorer, np.asarray(data.test.labels), test.predictions)
    validation_quality = validation_error = None
    if validation is not None:
        arrays |= {"validation_losses": validation.losses, "validation_predictions": validation.predictions}
        labels = data.validation.labels
        validation_quality = score_predictions(task.scorer, labels, validation.predictions)
        validation_error = estimate_standard_error(task.scorer, np.asarray(labels), validation.predictions)
    agreement = None
    # What was stopped early would have scored otherwise at its full length.
    if data.splits.digest == recipe.provenance.task_digest and recipe.measured_steps == recipe.trial_steps:
        agreement = compare(
            recipe.prediction, test_quality=quality, test_error=error, validation_quality=validation_quality,
            validation_error=validation_error,
        )  # fmt: skip
    files = sorted(path for path in (out / ADAPTER).iterdir() if path.suffix in (".safetensors", ".bin"))
    return TrainingResult(
        task_name=recipe.task_name,
        model=recipe.model,
        scorer=task.scorer,
        steps=steps,
        best_step=best.step if best else steps,
        stopped_early=steps < recipe.steps,
        num_train=num_train,
        num_validation=len(data.validation.labels),
        num_test=len(data.test.labels),
        validation_quality=validation_quality,
        validation_loss=None if validation is None else float(validation.losses.mean()),
        test_quality=quality,
        test_standard_error=error,
        test_loss=float(test.losses.mean()),
        prediction=recipe.prediction,
        agreement=agreement,
        train_seconds=seconds,
        peak_bytes=peak,
        trainable_parameters=built.parameters.adapter,
        head_parameters=built.parameters.head,
        saved_as=saved_as,
        adapter_bytes=sum(path.stat().st_size for path in files),
        processes=processes,
        device=describe_machine(device),
        scores_file=_SCORES,
        scores_digest=write_whole(out / _SCORES, lambda file: np.savez_compressed(file, **arrays)),
        data_digest=data.splits.digest,
        model_digest=digest_weights(model),
        weights_digests={path.name: digest_file(path) for path in files},
        autopeft=autopeft.__version__,
        packages={name: version(name) for name in _PACKAGES},
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
