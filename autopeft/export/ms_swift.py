"""Target `ms-swift`: a file for `swift sft`. Beside transformers it alone trains classifiers."""

from __future__ import annotations

from typing import Any

from autopeft.export.bundle import Bundle
from autopeft.export.common import training_arguments
from autopeft.export.files import to_yaml
from autopeft.export.lora import install, list_differences
from autopeft.export.rows import Row, write_rows
from autopeft.export.settings import (
    Entries,
    Rule,
    Unsaid,
    Values,
    choose,
    only,
    product,
    said_elsewhere,
    say_all,
    to,
    unless,
    whole,
)
from autopeft.export.target import Export, Target
from autopeft.methods import find_method
from autopeft.methods.facts import make_example_context
from autopeft.methods.low_rank import target_sizes
from autopeft.production.recipe import Recipe
from autopeft.tasks.data import Example
from autopeft.tasks.spec import TaskSpec

TITLE = "ms-swift"


def _whole(key: str) -> Rule:
    return whole(key, TITLE)


def _tuner(name: str, key: str) -> Rule:
    return lambda value, values: {"tuner_type": name, key: value}


_QLORA: dict[str, Rule] = {
    "rank": _tuner("lora", "lora_rank"),
    "alpha_over_rank": product("lora_alpha", "rank", _whole),
    "dropout": to("lora_dropout"),
    "lr_ratio_b": unless(1.0, to("lorap_lr_ratio")),
}
_ADALORA = {
    "target_r": to("adalora_target_r"),
    "init_r": to("adalora_init_r"),
    "lora_alpha": _whole("lora_alpha"),
    "lora_dropout": to("lora_dropout"),
    "orth_reg_weight": to("adalora_orth_reg_weight"),
    "tinit": to("adalora_tinit"),
    "tfinal": to("adalora_tfinal"),
    "deltaT": to("adalora_deltaT"),
    # It counts the steps by itself.
    "total_step": said_elsewhere,
}
"""By the names that peft has for AdaLoRA's settings, which the method works out."""
METHODS: dict[str, dict[str, Rule]] = {
    "lora": {
        **_QLORA,
        "dora": to("use_dora"),
        "rslora": to("use_rslora"),
        "init": choose(
            {"default": {}, "pissa": {"init_weights": "pissa_niter_4"}, "olora": {"init_weights": "olora"}},
            "ms-swift has no start of LoRA by {}.",
        ),
    },
    "qlora": _QLORA,
    "adalora": dict.fromkeys(
        (
            "rank", "initial_over_rank", "alpha_over_initial_rank", "dropout", "orthogonality", "initial_share",
            "final_share",
        ),
        said_elsewhere,
    ),
    "vera": {
        "rank": _tuner("vera", "vera_rank"),
        "d_initial": to("vera_d_initial"),
        "dropout": to("vera_dropout"),
    },
    "boft": {
        "block_size": _tuner("boft", "boft_block_size"),
        "butterfly_factors": only(
            1, "ms-swift trains BOFT with {} butterfly factors only where peft can compile its CUDA kernel."
        ),
    },
    "full": {},
}  # fmt: skip
"""FourierFT is not among them: ms-swift gives neither its seed nor a start at zero. IA3's targets are its own."""


def _bits(value: int, values: Values) -> Entries:
    if value >= 16:
        return {}
    quantization: Entries = {"quant_method": "bnb", "quant_bits": value}
    if value == 4:
        quantization |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return quantization


TRAINING = training_arguments(
    bits=_bits,
    precision=choose(
        # Left open, fp16 is on wherever weights are in float32.
        {
            "bfloat16": {"torch_dtype": "bfloat16", "bf16": True, "fp16": False},
            "float32": {"torch_dtype": "float32", "bf16": False, "fp16": False},
        },
        "ms-swift has no precision {}.",
    ),
)


def refuse(recipe: Recipe, task: TaskSpec) -> str | None:
    if task.text_pair is not None:
        raise Unsaid("ms-swift's templates have no place for the second text of a pair.")
    _say(recipe)
    return None


def _say(recipe: Recipe) -> Entries:
    entries = say_all(recipe, METHODS, TRAINING, title=TITLE)
    if recipe.spec.method == "adalora":
        method = find_method("adalora")
        assert method.peft is not None
        arguments = method.peft(recipe.training_spec(), make_example_context("decoder", "all-linear")).arguments
        entries["tuner_type"] = "adalora"
        for name, rule in _ADALORA.items():
            entries |= rule(arguments[name], arguments)
    if recipe.spec.method == "vera":
        # The frozen projections are drawn from it.
        entries["vera_projection_prng_key"] = recipe.seed
    return entries


def write(bundle: Bundle) -> Export:
    task, recipe = bundle.task, bundle.recipe
    entries = {"tuner_type": "full", **_say(recipe)}
    if entries["tuner_type"] == "vera":
        _check_one_size(bundle)
    if entries["tuner_type"] != "full":
        entries["target_modules"] = bundle.targets
        if bundle.context.head:
            entries["modules_to_save"] = list(bundle.context.head)
    content: dict[str, Any] = {
        "model": bundle.model,
        "use_hf": True,
        **_describe_task(bundle),
        **entries,
        "dataset": "data/train.jsonl",
        "val_dataset": "data/validation.jsonl",
        "split_dataset_ratio": 0,
        # Rows as they are: what the tokenizer itself puts around them, and nothing else.
        "template": "dummy",
        "max_length": task.max_length,
        "truncation_strategy": "right",
        "packing": False,
        "output_dir": "output",
        "add_version": False,
        "eval_strategy": "epoch",
        "logging_steps": 10,
        "report_to": "none",
    }
    if recipe.spec.method == "full":
        # As in the trial: a weight in bfloat16 would round updates away. Steps compute in bfloat16 all the same.
        content["torch_dtype"] = "float32"
    notes = list_differences(bundle)
    if bundle.context.head:
        notes.append("The head is drawn by transformers when the model is loaded, not from the trial's seed.")
    return Export(
        files={
            "train.yaml": to_yaml(content, "Run in this folder: swift sft train.yaml"),
            **write_rows(bundle, _to_row),
        },
        commands=(install(bundle, "ms-swift==4.6.0"), "swift sft train.yaml"),
        notes=tuple(notes),
    )


def _describe_task(bundle: Bundle) -> Entries:
    kind: Entries = {}
    if bundle.context.kind == "encoder":
        # Its list of models knows few encoders by name; this type loads whatever transformers has.
        kind = {"model_type": "bert"}
    elif bundle.recipe.model.startswith("local:"):
        # It knows decoders by their hub ids, and for a folder must be told; most of its types are transformers'.
        kind = {"model_type": bundle.architecture}
    if bundle.task.kind == "generation":
        return {"task_type": "causal_lm", **kind}
    return {
        "task_type": "seq_cls",
        "num_labels": len(bundle.task.labels),
        "problem_type": "single_label_classification",
        **kind,
    }


def _check_one_size(bundle: Bundle) -> None:
    sizes = sorted(set(target_sizes(bundle.context).values()))
    if len(sizes) > 1:
        raise Unsaid(
            f"ms-swift puts VeRA on layers of one size and leaves out all others, but these targets have {len(sizes)}."
        )


def _to_row(example: Example) -> Row:
    question = {"role": "user", "content": example.text}
    if example.completion is None:
        return {"messages": [question], "label": example.label}
    return {"messages": [question, {"role": "assistant", "content": example.completion}]}


TARGET = Target(title=TITLE, package="ms-swift==4.6.0", refuse=refuse, write=write)
