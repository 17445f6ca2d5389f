"""Target `trl`: a file for `trl sft --config`."""

from __future__ import annotations

from autopeft.export.bundle import Bundle
from autopeft.export.common import training_arguments
from autopeft.export.files import to_yaml
from autopeft.export.lora import (
    install,
    list_differences,
    no_initialisation,
    no_lora_plus,
    refuse_classifier,
    say_bundle,
)
from autopeft.export.rows import to_neutral, to_tokens, write_rows
from autopeft.export.settings import Entries, Rule, Values, choose, product, say_all, to
from autopeft.export.target import Export, Target
from autopeft.production.recipe import Recipe
from autopeft.tasks.data import Example
from autopeft.tasks.spec import TaskSpec

TITLE = "trl sft"


def _rank(value: int, values: Values) -> Entries:
    return {"use_peft": True, "lora_task_type": "CAUSAL_LM", "lora_r": value}


_QLORA: dict[str, Rule] = {
    "rank": _rank,
    "alpha_over_rank": product("lora_alpha", "rank"),
    "dropout": to("lora_dropout"),
    "lr_ratio_b": no_lora_plus(TITLE),
}
METHODS: dict[str, dict[str, Rule]] = {
    "lora": {**_QLORA, "dora": to("use_dora"), "rslora": to("use_rslora"), "init": no_initialisation(TITLE)},
    "qlora": _QLORA,
    "full": {},
}
TRAINING = training_arguments(
    bits=choose(
        {
            4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True},
            8: {"load_in_8bit": True},
            16: {},
            32: {},
        },
        "trl sft has no base of {} bits.",
    ),
    precision=choose(
        {"bfloat16": {"dtype": "bfloat16", "bf16": True}, "float32": {"dtype": "float32", "bf16": False}},
        "trl sft has no precision {}.",
    ),
)


def refuse(recipe: Recipe, task: TaskSpec) -> str | None:
    refuse_classifier(TITLE, task)
    say_all(recipe, METHODS, TRAINING, title=TITLE)
    return None


def write(bundle: Bundle) -> Export:
    words = bundle.words
    assert words is not None
    entries = say_bundle(bundle, METHODS, TRAINING, title=TITLE, targets="lora_target_modules")
    content = {
        "model_name_or_path": bundle.model,
        **entries,
        "dataset_name": "data",
        "dataset_train_split": "train",
        "dataset_test_split": "validation",
        "max_length": bundle.task.max_length,
        "packing": False,
        "pad_token": words.pad,
        "output_dir": "output",
        "eval_strategy": "epoch",
        "logging_steps": 10,
        "report_to": "none",
    }
    if bundle.recipe.spec.method == "full":
        # As in the trial: a weight in bfloat16 would round updates away. Steps compute in bfloat16 all the same.
        content["dtype"] = "float32"
    rows, notes = text_or_tokens(bundle)
    if bundle.recipe.spec.bits < 16:
        notes.append("On a quantized base TRL keeps the adapter in bfloat16, the trial in float32.")
    return Export(
        files={"sft.yaml": to_yaml(content, "Run in this folder: trl sft --config sft.yaml"), **rows},
        commands=(install(bundle, "trl[peft]==1.16.0"), "trl sft --config sft.yaml"),
        notes=(*notes, *list_differences(bundle)),
    )


def text_or_tokens(bundle: Bundle) -> tuple[dict[str, str], list[str]]:
    """Text where TRL makes the study's tokens of it, else tokens."""
    words = bundle.words
    assert words is not None
    if words.joins:
        return write_rows(bundle, to_neutral if bundle.task.prompt else _to_text), []
    note = (
        "Rows are tokens, not text: TRL tokenizes a row as one text, of which this tokenizer makes other tokens than "
        "of prompt, completion and end apart, as the study took them."
    )
    return write_rows(bundle, to_tokens(bundle)), [note]


def _to_text(example: Example) -> dict[str, str]:
    return {"text": example.completion or ""}


TARGET = Target(title="TRL", package="trl==1.16.0", refuse=refuse, write=write)
