"""Full training of a language model: completions alone count, however a batch is divided."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from listeners import Silent
from safetensors.torch import load_file

from autopeft.backends.base import Finished, Stretch, WorkerSetup
from autopeft.backends.hf.trial import HfBackend
from autopeft.errors import SpecError
from autopeft.production.files import LocalPlaces, TrainingResult
from autopeft.production.options import Options
from autopeft.production.recipe import Recipe
from autopeft.production.run import train
from autopeft.tasks.data import load_splits
from autopeft.tasks.spec import parse_task
from autopeft.testing.tiny_models import tiny_folder

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def task_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Answers of one to six words, so that parts of a batch differ in what counts."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("language") / "rows.jsonl"
    rows = []
    for _ in range(64):
        words = [f"word{rng.randrange(92)}" for _ in range(rng.randint(1, 6))]
        rows.append(json.dumps({"question": " ".join(reversed(words)), "answer": " ".join(words)}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return (
        "name: turn\ntitle: Turned words\nkind: generation\nprompt: '{question} '\ncompletion: '{answer}'\n"
        f"files: {{train: {path}}}\n"
    )


def run(make_recipe_for: Make, task_text: str, out: Path, **changes: int) -> TrainingResult:
    task = parse_task(task_text, "turn")
    splits = load_splits(task, None, seed=0)
    recipe = make_recipe_for("lora", architecture="llama", task=task_text, num_train=len(splits.train), **changes)
    provenance = dataclasses.replace(recipe.provenance, task_digest=splits.digest)
    prediction = dataclasses.replace(recipe.prediction, scorer="token_accuracy")
    result = train(
        dataclasses.replace(recipe, provenance=provenance, prediction=prediction), task, LocalPlaces(),
        model=tiny_folder("llama"), out=out, options=Options(patience=None, evaluate_every=8), listener=Silent(),
    )  # fmt: skip
    assert result is not None
    return result


def test_a_language_recipe_of_the_trials_length_is_the_trial_to_the_bit(
    make_recipe_for: Make, task_text: str, tmp_path: Path
) -> None:
    result = run(make_recipe_for, task_text, tmp_path / "out")
    setup = WorkerSetup(
        backend="hf", model=tiny_folder("llama"), task=task_text, data_dir=None, split_seed=0,
        study_dir=str(tmp_path / "trial"), device="cpu", threads=torch.get_num_threads(),
    )  # fmt: skip
    spec = make_recipe_for("lora").spec
    stretch = Stretch(
        job=0, trial=0, spec=spec, purpose="confirm", from_step=0, to_step=spec.max_steps, score_test=True
    )
    finished = HfBackend(setup).run(stretch, lambda event: None)
    assert isinstance(finished, Finished)
    assert finished.test is not None
    assert (result.test_quality, result.test_loss) == (finished.test.quality, finished.test.loss)
    assert result.head_parameters == 0
    assert result.agreement is not None


def test_a_recipe_that_would_train_nothing_is_refused_before_anything_is_written(
    make_recipe_for: Make, task_text: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="a language model has none: nothing would be trained"):
        train(
            make_recipe_for("head", architecture="llama", task=task_text), parse_task(task_text, "turn"), LocalPlaces(),
            model=tiny_folder("llama"), out=tmp_path / "out", options=Options(), listener=Silent(),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_tokens_weigh_alike_however_a_batch_is_divided(make_recipe_for: Make, task_text: str, tmp_path: Path) -> None:
    run(make_recipe_for, task_text, tmp_path / "whole")
    run(make_recipe_for, task_text, tmp_path / "parts", micro_batch=2, gradient_accumulation=4)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
