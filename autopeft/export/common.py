"""How transformers' own arguments say a training; TRL, LLaMA-Factory and ms-swift take them by the same names."""

from __future__ import annotations

from autopeft.export.settings import Entries, Rule, Values, choose, said_elsewhere, to

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
"""Names of transformers' `OptimizerNames`."""
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""A trial's (PyTorch's and bitsandbytes' defaults), said because trainers have defaults of their own: ms-swift's
second beta is 0.95."""


def optimizer(key: str = "optim") -> Rule:
    """The optimizer by transformers' name, and its constants, which Axolotl takes by the same names."""
    return choose({ours: {key: theirs, **ADAM} for ours, theirs in OPTIMIZERS.items()}, "no optimizer {}.")


def schedule(key: str = "lr_scheduler_type", arguments: str = "lr_scheduler_kwargs") -> Rule:
    """The schedule by transformers' names, restarts included."""

    def rule(value: str, values: Values) -> Entries:
        if value == "constant":
            return {key: "constant_with_warmup"}
        if value == "cosine_with_restarts":
            return {key: value, arguments: {"num_cycles": values["num_cycles"]}}
        return {key: value}

    return rule


def training_arguments(**changes: Rule) -> dict[str, Rule]:
    """A table of `settings.TRAINING` in transformers' words, with `changes`; `bits` is each target's own."""
    table: dict[str, Rule] = {
        "learning_rate": to("learning_rate"),
        "schedule": schedule(),
        "num_cycles": said_elsewhere,
        "warmup_steps": to("warmup_steps"),
        "steps": to("max_steps"),
        "micro_batch": to("per_device_train_batch_size"),
        "gradient_accumulation": to("gradient_accumulation_steps"),
        "weight_decay": to("weight_decay"),
        "max_grad_norm": to("max_grad_norm"),
        "optimizer": optimizer(),
        "precision": choose({"bfloat16": {"bf16": True}, "float32": {"bf16": False}}, "no precision {}."),
        "checkpoint_activations": to("gradient_checkpointing"),
        "seed": to("seed"),
    }
    return table | changes
