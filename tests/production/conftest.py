"""A recipe for a random model of two layers and a made-up task: what training needs, in milliseconds a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from autopeft.production.files import LocalPlaces
from autopeft.production.recipe import MAX_GRAD_NORM, Prediction, Recipe, find_task_files, lay_out
from autopeft.records import Provenance, TrialSpec
from autopeft.tasks.data import load_splits
from autopeft.tasks.spec import parse_task
from autopeft.testing.tiny_models import ArchitectureName, tiny_folder, tiny_task

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def make_recipe_for(make_spec: Callable[..., TrialSpec]) -> MakeRecipe:
    """(method, **changes of the recipe): its recipe for the made-up task, eight steps of eight rows unless changed."""

    def make(method: str = "lora", *, architecture: ArchitectureName = "bert", **changes: Any) -> Recipe:
        spec = make_spec(method, batch_size=8, max_steps=8, **changes.pop("spec", {}))
        text = tiny_task()
        splits = load_splits(parse_task(text, "tiny"), None, seed=0)
        steps = changes.pop("steps", spec.max_steps)
        recipe = Recipe(
            model=f"local:{architecture}",
            model_digest="",
            task_name="tiny",
            task=text,
            split_seed=0,
            device_kind="cpu",
            spec=spec,
            trial_steps=spec.max_steps,
            trial_warmup_ratio=spec.warmup_ratio,
            trial_num_train=len(splits.train),
            num_train=len(splits.train),
            steps=spec.max_steps,
            epochs=1.0,
            warmup_steps=1,
            schedule=spec.schedule,
            num_cycles=1,
            effective_batch=spec.batch_size,
            micro_batch=spec.batch_size,
            gradient_accumulation=1,
            learning_rate=spec.learning_rate,
            weight_decay=spec.weight_decay,
            max_grad_norm=MAX_GRAD_NORM,
            optimizer=spec.optimizer,
            precision="float32",
            checkpoint_activations=False,
            seed=spec.seed,
            prediction=Prediction(
                scorer="accuracy",
                validation_quality=0.5,
                validation_sd=None,
                num_seeds=1,
                num_validation=len(splits.validation),
                test_quality=0.5,
                test_sd=0.1,
                num_confirmed=2,
                num_test=len(splits.test),
            ),
            cost=None,
            study="tiny",
            study_uid="0",
            trial=0,
            pick="knee",
            provenance=Provenance(
                autopeft="0",
                python="3",
                packages={},
                platform="x",
                device="x",
                device_count=1,
                threads=1,
                model_digest="",
                task_digest=splits.digest,
                num_train=len(splits.train),
                num_validation=len(splits.validation),
                num_test=len(splits.test),
                created_at="2026-01-01T00:00:00+00:00",
            ),
        )
        return dataclasses.replace(lay_out(recipe, num_train=len(splits.train), steps=steps), **changes)

    return make


@pytest.fixture(scope="session")
def places() -> LocalPlaces:
    return LocalPlaces(model=tiny_folder("bert"), files=find_task_files(tiny_task()))
