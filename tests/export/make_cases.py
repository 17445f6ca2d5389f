"""Exports of every method, width and kind of task, for the checks by the trainers' own parsers.

    python tests/export/make_cases.py FOLDER [METHOD,...]

Writes FOLDER/TARGET/CASE/ and FOLDER/TARGET/CASE.json, which says what the trainer must make of it: the configuration
that plain peft would be given, and the tokens of the first rows as a trial trains on them. Prints what is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chosen_trials import draw_recipe, write_rows
from tiny_models import make_tiny_llama

from autopeft.backends.hf.base_model import load_tokenizer
from autopeft.backends.hf.language import tokenize_completions
from autopeft.errors import AutopeftError
from autopeft.export import TARGETS, refuse_export, write_bundle
from autopeft.export.bundle import Bundle, adapter_config, complete_bundle
from autopeft.methods import METHODS
from autopeft.methods.faults import make_recipe_spec
from autopeft.records import TrialSpec
from autopeft.tasks.data import load_splits
from autopeft.tasks.spec import parse_task
from autopeft.testing.tiny_models import tiny_folder

KINDS = ("classification", "generation")
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True}, "rslora": {"rslora": True}, "pissa": {"init": "pissa"}, "olora": {"init": "olora"},
    "loraplus": {"lr_ratio_b": 4.0}, "dropout": {"dropout": 0.1}, "alpha": {"alpha_over_rank": 1.37},
}  # fmt: skip
TRAININGS: dict[str, dict[str, Any]] = {
    "cosine": {"schedule": "cosine"}, "constant": {"schedule": "constant"},
    "restarts": {"schedule": "cosine_with_restarts", "num_cycles": 3},
    "accumulation": {"micro_batch": 4, "gradient_accumulation": 4}, "checkpointing": {"checkpoint_activations": True},
    "adamw_8bit": {"optimizer": "adamw_8bit"}, "paged": {"optimizer": "paged_adamw_8bit"},
}  # fmt: skip


def list_specs(methods: list[str]) -> Iterator[tuple[str, TrialSpec, dict[str, Any]]]:
    """(name, configuration, changes to its recipe)."""
    for method in methods:
        for bits in METHODS[method].bits:
            yield f"{method}-{bits}bit", _spec(method, bits), {}
    for name, settings in VARIANTS.items():
        spec = _spec("lora", 16)
        yield f"lora-16bit-{name}", dataclasses.replace(spec, settings={**spec.settings, **settings}), {}
    for name, changes in TRAININGS.items():
        yield f"lora-16bit-{name}", _spec("lora", 16), changes


def _spec(method: str, bits: Any) -> TrialSpec:
    spec = make_recipe_spec(METHODS[method], device_kind="cuda" if bits == 16 else "cpu", bits=bits)
    return dataclasses.replace(spec, max_steps=4, batch_size=8, optimizer="adamw", warmup_ratio=0.25)


def make_models(folder: Path) -> dict[str, str]:
    """A tiny BERT, and a tiny Llama whose tokenizer begins a row and does not end it, as Llama's own."""
    bert = str(shutil.copytree(tiny_folder("bert"), folder / "bert", dirs_exist_ok=True))
    return {"classification": bert, "generation": make_tiny_llama(folder / "llama")}


def expected(bundle: Bundle) -> dict[str, Any]:
    tokenizer = load_tokenizer(bundle.model)
    rows = bundle.splits.train[:20]
    if bundle.task.kind == "generation":
        features = tokenize_completions(tokenizer, rows, max_length=bundle.task.max_length)
    else:
        features = [
            {"input_ids": tokenizer(row.text, truncation=True, max_length=bundle.task.max_length)["input_ids"]}
            for row in rows
        ]
    return {
        "peft": None if bundle.call is None else adapter_config(bundle),
        "rows": features,
        "kind": bundle.task.kind,
        "bits": bundle.recipe.spec.bits,
    }


def main(folder: Path, methods: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    models = make_models(folder / "models")
    refused: dict[str, int] = {}
    for kind in KINDS:
        text = write_rows(folder, kind)
        text = text.replace("name: tiny", f"name: tiny_{kind}")
        task = parse_task(text, "tiny")
        splits = load_splits(task, None, seed=0)
        for name, spec, changes in list_specs(methods):
            recipe, _ = draw_recipe(spec, kind, **changes)
            try:
                bundle = complete_bundle(recipe, task, text, splits, models[kind])
            except AutopeftError:
                # Not a method for this model.
                continue
            for target in TARGETS:
                case = f"{kind}-{name}"
                reason = refuse_export(target, recipe, task)
                if reason is None:
                    try:
                        write_bundle(bundle, target, folder / target / case, model=bundle.model, data_dir=None)
                        (folder / target / f"{case}.json").write_text(json.dumps(expected(bundle)))
                        continue
                    except AutopeftError as exc:
                        reason = str(exc)
                refused[target] = refused.get(target, 0) + 1
                print(f"refused {target} {case}: {reason}")
    for target in TARGETS:
        written = len(list((folder / target).glob("*.json")))
        print(f"{target}: {written} written, {refused.get(target, 0)} refused")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2].split(",") if len(sys.argv) > 2 else list(METHODS.shipped))
