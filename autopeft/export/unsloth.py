"""Target `unsloth`: a script on its Python interface and TRL.

Not a file for `unsloth train -c`, whose configuration (2026.10.9) has no optimizer, no schedule and no rows of prompt
and completion: it would train something else.
"""

from __future__ import annotations

from typing import Any

from autopeft.export.bundle import Bundle
from autopeft.export.common import training_arguments
from autopeft.export.lora import list_differences, no_lora_plus, note_narrow_weights, refuse_classifier
from autopeft.export.settings import Entries, Rule, Values, choose, only, product, said_elsewhere, say_all, to
from autopeft.export.target import Export, Target
from autopeft.export.trl import text_or_tokens
from autopeft.production.recipe import Recipe
from autopeft.tasks.spec import TaskSpec

TITLE = "Unsloth"
_LOADING = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning")
_ADAPTER = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights")


def _rank(value: int, values: Values) -> Entries:
    return {"r": value, "full_finetuning": False}


_QLORA: dict[str, Rule] = {
    "rank": _rank,
    "alpha_over_rank": product("lora_alpha", "rank"),
    "dropout": to("lora_dropout"),
    "lr_ratio_b": no_lora_plus(TITLE),
}
METHODS: dict[str, dict[str, Rule]] = {
    "lora": {
        **_QLORA,
        "dora": to("use_dora"),
        "rslora": to("use_rslora"),
        "init": choose(
            {
                "default": {},
                "pissa": {"init_lora_weights": "pissa_niter_4"},
                "olora": {"init_lora_weights": "olora"},
            },
            "Unsloth has no start of LoRA by {}.",
        ),
    },
    "qlora": _QLORA,
    "full": {},
}


def _bits(value: int, values: Values) -> Entries:
    if value == 32:
        return only(16, "Unsloth trains on GPUs, where the unquantized base has 16 bits; this one has {}.")(
            value, values
        )
    return {"load_in_4bit": value == 4, "load_in_8bit": value == 8, "load_in_16bit": value == 16}


TRAINING = training_arguments(
    bits=_bits,
    precision=choose({"bfloat16": {"bf16": True}}, "Unsloth trains on GPUs in bfloat16, but the study computed in {}."),
    checkpoint_activations=said_elsewhere,
)


def refuse(recipe: Recipe, task: TaskSpec) -> str | None:
    refuse_classifier(TITLE, task)
    say_all(recipe, METHODS, TRAINING, title=TITLE)
    return None


def write(bundle: Bundle) -> Export:
    entries = {"full_finetuning": True, **say_all(bundle.recipe, METHODS, TRAINING, title=TITLE)}
    rows, notes = text_or_tokens(bundle)
    return Export(
        files={"train.py": _render(bundle, entries), **rows},
        commands=("pip install 'unsloth==2026.10.9'", "python train.py"),
        notes=(
            "Unsloth's kernels round otherwise than PyTorch's, and its LoRA is drawn in an order of its own.",
            *note_narrow_weights(bundle, TITLE),
            *notes,
            *list_differences(bundle),
        ),
    )


def _render(bundle: Bundle, entries: Entries) -> str:
    from autopeft.export.script import render

    checkpointing: Any = "unsloth" if bundle.recipe.checkpoint_activations else False
    adapter = {name: entries[name] for name in _ADAPTER if name in entries}
    training = {name: value for name, value in entries.items() if name not in (*_LOADING, *_ADAPTER)}
    return render(
        "train_unsloth.py.j2",
        {
            "bundle": bundle,
            "recipe": bundle.recipe,
            "loading": {name: entries[name] for name in _LOADING},
            "adapter": {**adapter, "target_modules": bundle.targets} if adapter else {},
            "training": training,
            "checkpointing": checkpointing,
            "pad": bundle.words.pad if bundle.words else None,
        },
    )


TARGET = Target(title=TITLE, package="unsloth==2026.10.9", refuse=refuse, write=write)
