"""Target `axolotl`: a file for `axolotl train`."""

from __future__ import annotations

from autopeft.export.bundle import Bundle
from autopeft.export.common import optimizer, schedule, training_arguments
from autopeft.export.files import to_yaml
from autopeft.export.lora import list_differences, note_narrow_weights, refuse_classifier, say_bundle
from autopeft.export.rows import Row, write_rows
from autopeft.export.settings import Entries, Rule, Values, choose, product, say_all, to, unless, whole
from autopeft.export.target import Export, Target
from autopeft.production.recipe import Recipe
from autopeft.tasks.data import Example
from autopeft.tasks.spec import TaskSpec

TITLE = "Axolotl"


def _rank(value: int, values: Values) -> Entries:
    # `qlora` is LoRA on a 4-bit base; the adapter is the same.
    return {"adapter": "qlora" if values["bits"] == 4 else "lora", "lora_r": value}


_QLORA: dict[str, Rule] = {
    "rank": _rank,
    "alpha_over_rank": product("lora_alpha", "rank", lambda key: whole(key, TITLE)),
    "dropout": to("lora_dropout"),
    "lr_ratio_b": unless(1.0, to("loraplus_lr_ratio")),
}
METHODS: dict[str, dict[str, Rule]] = {
    "lora": {
        **_QLORA,
        "dora": to("peft_use_dora"),
        "rslora": to("peft_use_rslora"),
        "init": choose(
            {
                "default": {},
                "pissa": {"peft_init_lora_weights": "pissa_niter_4"},
                "olora": {"peft_init_lora_weights": "olora"},
            },
            "Axolotl has no start of LoRA by {}.",
        ),
    },
    "qlora": _QLORA,
    "full": {},
}
TRAINING = training_arguments(
    bits=choose(
        {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}, 16: {}, 32: {}}, "Axolotl has no base of {} bits."
    ),
    schedule=schedule("lr_scheduler"),
    micro_batch=to("micro_batch_size"),
    optimizer=optimizer("optimizer"),
)


def refuse(recipe: Recipe, task: TaskSpec) -> str | None:
    refuse_classifier(TITLE, task)
    say_all(recipe, METHODS, TRAINING, title=TITLE)
    return None


def write(bundle: Bundle) -> Export:
    words = bundle.words
    assert words is not None
    entries = say_bundle(bundle, METHODS, TRAINING, title=TITLE, targets="lora_target_modules")
    rows = {"ds_type": "json", "split": "train", "type": "input_output"}
    content = {
        "base_model": bundle.model,
        **entries,
        "datasets": [{"path": "data/train.jsonl", **rows}],
        "test_datasets": [{"path": "data/validation.jsonl", **rows}],
        "dataset_prepared_path": "prepared",
        "sequence_len": bundle.task.max_length,
        "excess_length_strategy": "truncate",
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "train_on_inputs": False,
        "special_tokens": {"pad_token": words.pad},
        "output_dir": "output",
        "eval_strategy": "epoch",
        "logging_steps": 10,
    }

    def to_row(example: Example) -> Row:
        begin = [{"label": False, "text": words.begin}] if words.begin is not None else []
        prompt = [{"label": False, "text": example.text}] if example.text else []
        return {
            "segments": [
                *begin, *prompt, {"label": True, "text": example.completion}, {"label": True, "text": words.end}
            ]
        }  # fmt: skip

    return Export(
        files={
            "axolotl.yaml": to_yaml(content, "Run in this folder: axolotl train axolotl.yaml"),
            **write_rows(bundle, to_row),
        },
        commands=("pip install --no-build-isolation 'axolotl==0.19.0'", "axolotl train axolotl.yaml"),
        notes=(
            "Rows are segments of text, of which those with `label: true` are learned; Axolotl tokenizes each by "
            "itself, as the study did, and adds nothing.",
            *note_narrow_weights(bundle, TITLE),
            *list_differences(bundle),
        ),
    )


TARGET = Target(title=TITLE, package="axolotl==0.19.0", refuse=refuse, write=write)
