"""Target `llama-factory`: a file for `llamafactory-cli train`, and the rows with their registration."""

from __future__ import annotations

import json

from autopeft.export.bundle import Bundle
from autopeft.export.common import training_arguments
from autopeft.export.files import to_yaml
from autopeft.export.lora import install, list_differences, refuse_classifier
from autopeft.export.rows import SPLITS, Row, write_rows
from autopeft.export.settings import (
    Entries,
    Rule,
    Values,
    choose,
    only,
    product,
    say_all,
    to,
    unless,
)
from autopeft.export.target import Export, Target
from autopeft.production.recipe import Recipe
from autopeft.tasks.data import Example
from autopeft.tasks.spec import TaskSpec

TITLE = "LLaMA-Factory"


def _rank(value: int, values: Values) -> Entries:
    return {"finetuning_type": "lora", "lora_rank": value}


def _init(value: str, values: Values) -> Entries:
    if value == "pissa":
        # The trial's four iterations; converted, so that plain peft puts the adapter on the untouched base.
        return {"pissa_init": True, "pissa_iter": 4, "pissa_convert": True}
    return only("default", "LLaMA-Factory starts LoRA from zero or by PiSSA, but init is {}.")(value, values)


_QLORA: dict[str, Rule] = {
    "rank": _rank,
    "alpha_over_rank": product("lora_alpha", "rank"),
    "dropout": to("lora_dropout"),
    "lr_ratio_b": unless(1.0, to("loraplus_lr_ratio")),
}
METHODS: dict[str, dict[str, Rule]] = {
    "lora": {**_QLORA, "dora": to("use_dora"), "rslora": to("use_rslora"), "init": _init},
    "qlora": _QLORA,
    "oft": {
        "block_size": to("oft_block_size", finetuning_type="oft", oft_rank=0),
        "shared_blocks": only(False, "LLaMA-Factory's OFT has no shared blocks."),
        "exact": only(False, "LLaMA-Factory's OFT has no exact Cayley transform."),
    },
    "full": {},
}


def _bits(value: int, values: Values) -> Entries:
    if value >= 16:
        return {}
    entries: Entries = {"quantization_method": "bnb", "quantization_bit": value}
    return entries if value == 8 else {**entries, "quantization_type": "nf4", "double_quantization": True}


TRAINING = training_arguments(
    bits=_bits,
    # It checkpoints unless told not to.
    checkpoint_activations=choose(
        {True: {"disable_gradient_checkpointing": False}, False: {"disable_gradient_checkpointing": True}}, "{}"
    ),
)


def refuse(recipe: Recipe, task: TaskSpec) -> str | None:
    refuse_classifier(TITLE, task)
    say_all(recipe, METHODS, TRAINING, title=TITLE)
    return None


def write(bundle: Bundle) -> Export:
    words, name = bundle.words, bundle.task.name
    assert words is not None
    entries = say_all(bundle.recipe, METHODS, TRAINING, title=TITLE)
    kind = entries.setdefault("finetuning_type", "full")
    if kind != "full":
        entries[f"{kind}_target"] = ",".join(bundle.targets)
    content = {
        "model_name_or_path": bundle.model,
        "stage": "sft",
        "do_train": True,
        **entries,
        "dataset_dir": "data",
        "dataset": name,
        "eval_dataset": f"{name}_validation",
        # Prompts and completions as they are, without the roles of a conversation.
        "template": "empty",
        "cutoff_len": bundle.task.max_length,
        "packing": False,
        "output_dir": "output",
        "eval_strategy": "epoch",
        "logging_steps": 10,
        "report_to": "none",
    }
    head = "Run in this folder: llamafactory-cli train train.yaml"
    info = {
        f"{name}{suffix}": {
            "file_name": f"{split}.jsonl",
            "formatting": "alpaca",
            "columns": {"prompt": "prompt", "response": "completion"},
        }
        for split, suffix in zip(SPLITS, ("", "_validation", "_test"), strict=True)
    }

    def to_row(example: Example) -> Row:
        # The template "empty" begins and ends nothing by itself.
        return {"prompt": f"{words.begin or ''}{example.text}", "completion": f"{example.completion}{words.end}"}

    return Export(
        files={
            "train.yaml": to_yaml(content, head),
            "data/dataset_info.json": json.dumps(info, indent=2) + "\n",
            **write_rows(bundle, to_row),
        },
        commands=(install(bundle, "llamafactory==0.9.5"), "llamafactory-cli train train.yaml"),
        notes=(
            f"Completions in the rows end in {words.end}, and prompts begin as the tokenizer begins a text, because "
            "LLaMA-Factory's template `empty` adds neither.",
            *list_differences(bundle),
        ),
    )


TARGET = Target(title=TITLE, package="llamafactory==0.9.5", refuse=refuse, write=write)
