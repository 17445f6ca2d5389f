"""What trainers that have LoRA, quantized bases and full fine-tuning, and nothing else, say alike."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from autopeft.export.bundle import Bundle
from autopeft.export.settings import Entries, Rule, Table, Unsaid, only, say_all
from autopeft.tasks.spec import TaskSpec


def refuse_classifier(title: str, task: TaskSpec) -> None:
    """Raises Unsaid for a task that is not generation."""
    if task.kind == "classification":
        raise Unsaid(f"{title} trains language models and no sequence classifiers.")


def say_bundle(bundle: Bundle, methods: Mapping[str, Table], training: Table, *, title: str, targets: str) -> Entries:
    """The entries for method and training; where there is an adapter, what it is put on by the name `targets`."""
    entries = say_all(bundle.recipe, methods, training, title=title)
    return entries if bundle.call is None else entries | {targets: bundle.targets}


def no_lora_plus(title: str) -> Rule:
    return only(1.0, f"{title} has no LoRA+, but lr_ratio_b is {{:g}}.")


def no_initialisation(title: str) -> Rule:
    return only("default", f"{title} starts LoRA from zero alone, but init is {{}}.")


def no(title: str, what: str) -> Rule:
    """For a switch that a trainer lacks: False is said by saying nothing."""
    return only(False, f"{title} has no {what}.")


def list_differences(bundle: Bundle) -> list[str]:
    """What every trainer but our own script does otherwise than the trial, and rows that were cut."""
    recipe, notes = bundle.recipe, []
    if bundle.words is not None and bundle.words.num_cut:
        notes.append(
            f"The prompts of {bundle.words.num_cut:,} rows are longer than {bundle.task.max_length} tokens with their "
            "completions. They were cut from the left when this was written, as in the study."
        )
    if recipe.warmup_steps:
        notes.append("Warm-up starts at zero, the trial's one step above it.")
    if recipe.weight_decay:
        notes.append("Weight decay leaves out norms and biases, where the trial's has all that trains.")
    return [*notes, "Rows come in an order of the trainer's own, and batches are not put together by length."]


def note_narrow_weights(bundle: Bundle, title: str) -> list[str]:
    """Of trainers that hold in bfloat16 whatever weights they train."""
    if bundle.recipe.spec.method != "full" or bundle.recipe.precision != "bfloat16":
        return []
    return [
        f"{title} holds the weights that it trains in bfloat16, the trial in float32: small updates are rounded away, "
        "so the learning rate may not hold. The script (--to trainer) trains as the trial did."
    ]


def install(bundle: Bundle, *packages: str) -> str:
    """The command that installs a trainer, and bitsandbytes where the configuration needs it."""
    needed = bundle.recipe.spec.bits < 16 or bundle.recipe.optimizer != "adamw"
    return shlex.join(["pip", "install", *packages, *(["bitsandbytes"] if needed else [])])
