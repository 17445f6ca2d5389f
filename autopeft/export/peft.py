"""Target `peft`: adapter_config.json, for `autopeft train` or a training loop of one's own."""

from __future__ import annotations

import json

from autopeft.export.bundle import Bundle, adapter_config
from autopeft.export.rows import neutral_rows
from autopeft.export.target import Export, Target
from autopeft.methods import find_method
from autopeft.production.recipe import Recipe
from autopeft.tasks.spec import TaskSpec


def refuse(recipe: Recipe, task: TaskSpec) -> str | None:
    method = find_method(recipe.spec.method)
    return method.why_not_peft if method.peft is None else None


def write(bundle: Bundle) -> Export:
    config = json.dumps(adapter_config(bundle), indent=2) + "\n"
    notes = [
        "adapter_config.json holds the adapter alone; the rest is in training.yaml. In a loop of your own: "
        '`peft.get_peft_model(model, peft.PeftConfig.from_pretrained("."))`.'
    ]
    spec = bundle.recipe.spec
    start = find_method(spec.method).start
    if start is not None and start.count_tokens(spec):
        notes.append(
            "EVA begins with rows: before the first step of such a loop, call `peft.initialize_lora_eva_weights(model, "
            "batches)` with batches of inputs without labels. `autopeft train` shows it 10 batches at most, or as much "
            "in smaller ones where memory is short."
        )
    return Export(
        files={"adapter_config.json": config, **neutral_rows(bundle)},
        commands=("autopeft train . --out trained",),
        notes=tuple(notes),
    )


TARGET = Target(title="peft", package="peft==0.21.2", refuse=refuse, write=write)
