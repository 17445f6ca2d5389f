"""Chosen trials of made-up studies, their recipes, and rows of words that tiny models know."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from autopeft.methods import METHODS
from autopeft.methods.faults import make_recipe_spec
from autopeft.production.recipe import Recipe, make_recipe
from autopeft.records import (
    Completed,
    Confirmation,
    Cost,
    LedgerRecord,
    Provenance,
    RungScore,
    StudyConfig,
    StudyRecord,
    TrialRecord,
    TrialSpec,
)
from autopeft.tasks.spec import TaskSpec, parse_task

CLASSIFICATION = "name: tiny\ntitle: Made-up words\ntext: text\nlabels: [even, odd]\nmax_length: 16\n"
GENERATION = (
    'name: tiny\ntitle: Made-up words\nkind: generation\nprompt: "{text} "\ncompletion: "{answer}"\nmax_length: 16\n'
)
TASKS = {"classification": CLASSIFICATION, "generation": GENERATION}


def make_trial(number: int = 3, spec: TrialSpec | None = None, **changes: Any) -> TrialRecord:
    spec = spec or make_recipe_spec(METHODS["lora"], device_kind="cpu")
    rung = RungScore(
        rung=0, step=spec.max_steps, quality=changes.pop("quality", 0.8), loss=0.5, num_examples=100,
        device_seconds=1.0, train_seconds=1.0, scores_file="s", scores_digest="0",
    )  # fmt: skip
    confirmation = Confirmation(
        seed=9, quality=rung.quality, loss=0.5, test_quality=0.75, test_loss=0.6, num_test_examples=50,
        device_seconds=1.0, scores_file="s", scores_digest="0",
    )  # fmt: skip
    cost = Cost(
        trainable_parameters=changes.pop("parameters", 1000), head_parameters=10,
        peak_vram_bytes=changes.pop("vram_bytes", 2**30), vram_source="estimated",
    )  # fmt: skip
    values: dict[str, Any] = {
        "number": number, "spec": spec, "source": "sampler", "state": "complete", "cost": cost, "rungs": (rung,),
        "outcome": Completed(), "device_seconds": 1.0,
        "confirmations": (confirmation,) * changes.pop("confirmed", 1),
    }  # fmt: skip
    return TrialRecord(**(values | changes))


def make_study(trials: list[TrialRecord], *, task: str = CLASSIFICATION, **config: Any) -> StudyRecord:
    values: dict[str, Any] = {
        "name": "evening", "task": task, "task_name": "tiny", "model": "local:tiny", "budget": "5trials",
        "objectives": ("quality", "vram", "params"), "rungs": (40,), "seed": 0, "workers": 1, "device_kind": "cpu",
        "space": "", "space_name": "default", "methods": None, "fixed": {}, "included": (), "max_vram_bytes": None,
        "confirm_share": 0.2, "confirm_seeds": 1, "until": None, "price_per_device_hour": None,
        "majority_quality": 0.5, "majority_test_quality": 0.5, "scorer": "accuracy",
    }  # fmt: skip
    provenance = Provenance(
        autopeft="0.1.0", python="3.11", packages={}, platform="Linux", device="CPU", device_count=1, threads=1,
        model_digest="abc", task_digest="def", num_train=100, num_validation=10, num_test=10,
        created_at="2026-01-01T00:00:00",
    )  # fmt: skip
    return StudyRecord(
        uid="u1", config=StudyConfig(**(values | config)), provenance=provenance, trials=tuple(trials), baseline=None,
        ledger=LedgerRecord(
            search_seconds=0, confirm_seconds=0, baseline_seconds=0, lost_seconds=0, wall_seconds=0
        ),
        segments=(), front=(), picks=(), hypervolume=None, notes=(), finished=True,
    )  # fmt: skip


def draw_recipe(spec: TrialSpec, kind: str = "classification", **changes: Any) -> tuple[Recipe, TaskSpec]:
    """The trial's own length, on the device whose width the base has."""
    device = "cuda" if spec.bits == 16 else "cpu"
    trial = make_trial(spec=spec)
    scorer = "accuracy" if kind == "classification" else "token_accuracy"
    study = make_study([trial], task=TASKS[kind], device_kind=device, scorer=scorer)
    recipe = make_recipe(study, trial, pick="best", num_train=100, steps=spec.max_steps)
    return dataclasses.replace(recipe, **changes), parse_task(TASKS[kind], "tiny")


def write_rows(folder: Path, kind: str, num_rows: int = 120) -> str:
    """A task file's text with rows of words that the tiny models know; the first word decides the answer."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(80)] if kind == "classification" else [*"bcdefghijklmno"]
    rows = []
    for index in range(num_rows):
        first = words[2 * rng.randrange(len(words) // 2) + index % 2]
        row = {"text": " ".join([first, *rng.choices(words, k=1 + rng.randrange(5))])}
        rows.append(row | ({"label": index % 2} if kind == "classification" else {"answer": f"{first} in the area"}))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TASKS[kind] + f"files: {{train: {path}}}\n"
