"""Finished training folders as `autopeft train` leaves them, of tiny random models, made in a second."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import transformers

from autopeft.backends.hf.base_model import digest_file
from autopeft.backends.hf.build import build_trial_model, count_trainable
from autopeft.backends.hf.data import TaskData, scoring_batches
from autopeft.backends.hf.saved import copy_adapter, save_adapter, save_trained
from autopeft.backends.hf.steps import build_optimizer, score_batches, train_step
from autopeft.backends.hf.trial import digest_weights
from autopeft.methods import METHODS
from autopeft.production.files import LocalPlaces, SavedAs, TrainingResult, write_local, write_recipe, write_result
from autopeft.production.recipe import Prediction, Recipe, find_task_files, make_task_portable
from autopeft.records import Bits, Provenance, Scalar, TrialSpec
from autopeft.tasks.scorers import score_predictions
from autopeft.tasks.spec import parse_task
from autopeft.testing.subject import Case
from autopeft.testing.tiny_models import ArchitectureName, tiny_base, tiny_folder

NUM_STEPS = 12


def write_rows(folder: Path, *, seed: int = 0) -> str:
    """Train and test files of made-up words, whose first one decides the label; the text of a task file of theirs."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = []
        for index in range(96):
            words = [f"word{2 * rng.randrange(46) + index % 2}", *(f"word{rng.randrange(92)}" for _ in range(6))]
            rows.append(json.dumps({"text": " ".join(words[: rng.randint(2, 7)]), "label": index % 2}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return (
        "name: tiny\ntitle: Made-up words\ntext: text\nlabels: [even, odd]\n"
        f"files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}\n"
    )


def make_recipe(spec: TrialSpec, task_text: str, *, model: str, num_test: int) -> Recipe:
    provenance = Provenance(
        autopeft="0.1.0", python="3.11", packages={"torch": "2.13.0"}, platform="Linux", device="a CPU", device_count=1,
        threads=1, model_digest="", task_digest="", num_train=80, num_validation=16, num_test=num_test,
        created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    prediction = Prediction(
        scorer="accuracy", validation_quality=0.7, validation_sd=None, num_seeds=1, num_validation=16,
        test_quality=0.68, test_sd=None, num_confirmed=1, num_test=num_test,
    )  # fmt: skip
    return Recipe(
        model=model, model_digest="", task_name="tiny", task=make_task_portable(task_text), split_seed=0,
        device_kind="cpu", spec=spec, trial_steps=NUM_STEPS, trial_warmup_ratio=0.0, trial_num_train=80, num_train=80,
        steps=NUM_STEPS, epochs=NUM_STEPS * 8 / 80, warmup_steps=0, schedule="constant", num_cycles=1,
        effective_batch=8, micro_batch=8, gradient_accumulation=1, learning_rate=spec.learning_rate,
        weight_decay=0.0, max_grad_norm=1.0, optimizer="adamw", precision="float32", checkpoint_activations=False,
        seed=spec.seed, prediction=prediction, cost=None, study="tiny-study", study_uid="0123", trial=7,
        pick="knee", provenance=provenance,
    )  # fmt: skip


def make_finished(
    folder: Path,
    method: str,
    architecture: ArchitectureName,
    *,
    bits: Bits = 32,
    settings: tuple[tuple[str, Scalar], ...] = (),
) -> Path:
    """Trains for a few steps and writes what a finished training holds. Raises SpecError where the model refuses."""
    spec = dataclasses.replace(Case(METHODS[method], architecture, bits, settings).spec(), max_steps=NUM_STEPS)
    base_folder = tiny_folder(architecture)
    task_text = write_rows(folder.parent / f"{folder.name}-rows")
    data = TaskData(parse_task(task_text, "tiny"), model=base_folder, data_dir=None, split_seed=0)
    base = tiny_base(architecture, bits)
    model = build_trial_model(base, spec)
    initial = copy_adapter(model) if isinstance(model, peft.PeftModel) else None
    optimizer = build_optimizer(model, spec)
    for step in range(NUM_STEPS):
        batch = data.collate(data.train, range(8 * (step % 8), 8 * (step % 8) + 8), "cpu")
        train_step(model, optimizer, batch, learning_rate=spec.learning_rate, device="cpu")
    model.eval()
    saved_as = save(model, spec, folder / "adapter", initial)
    data.tokenizer.save_pretrained(folder / "adapter")
    test = data.test
    scores = score_batches(
        model, scoring_batches(test.lengths(), 16), lambda rows: data.collate(test, rows, "cpu"), device="cpu"
    )
    np.savez(
        folder / "scores.npz",
        test_losses=scores.losses.astype(np.float16),
        test_predictions=scores.predictions.astype(np.int16),
    )
    recipe = make_recipe(spec, task_text, model=f"local:{architecture}", num_test=len(test.labels))
    write_recipe(recipe, folder)
    paths = find_task_files(task_text)
    write_local(LocalPlaces(model=base_folder, files=dict(paths)), folder)
    quality = score_predictions("accuracy", test.labels, scores.predictions)
    counts = count_trainable(model, base.head)
    files = sorted((folder / "adapter").glob("*.safetensors"))
    write_result(
        TrainingResult(
            task_name="tiny", model=recipe.model, scorer="accuracy", steps=NUM_STEPS, best_step=NUM_STEPS,
            stopped_early=False, num_train=80, num_validation=16, num_test=len(test.labels), validation_quality=0.7,
            validation_loss=0.6, test_quality=quality, test_standard_error=0.05, test_loss=float(scores.losses.mean()),
            prediction=recipe.prediction, agreement=None, train_seconds=1.0, peak_bytes=None,
            trainable_parameters=counts.adapter, head_parameters=counts.head, saved_as=saved_as,
            adapter_bytes=sum(path.stat().st_size for path in files), processes=1, device="a CPU",
            scores_file="scores.npz", scores_digest=digest_file(folder / "scores.npz"),
            data_digest=data.splits.digest, model_digest=digest_weights(base_folder),
            weights_digests={path.name: digest_file(path) for path in files}, autopeft="0.1.0",
            packages={"torch": "2.13.0", "peft": "0.21.2"}, finished_at="2026-01-01T00:00:00+00:00",
        ),
        folder,
    )  # fmt: skip
    return folder


def save(model: Any, spec: TrialSpec, folder: Path, initial: dict[str, Any] | None) -> SavedAs:
    if isinstance(model, peft.PeftModel):
        save_adapter(model, spec, folder, initial=initial)
        return "peft"
    if METHODS[spec.method].writes_base(spec):
        assert isinstance(model, transformers.PreTrainedModel)
        model.save_pretrained(folder)
        return "transformers"
    save_trained(model, spec, folder)
    return "autopeft"
