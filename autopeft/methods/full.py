"""Full fine-tuning, and the trained head on a frozen base that every study has as its baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopeft.errors import SpecError
from autopeft.methods.base import UNQUANTIZED, BuildContext, Method, Recipe
from autopeft.records import TaskKind, TrialSpec

if TYPE_CHECKING:
    from torch import nn


def _unfreeze(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(context.unread))
    return model


def check_trains(method: Method, task_kind: TaskKind) -> None:
    """Raises SpecError where nothing would be trained. The row itself takes a language model: the untrained base that a
    study of a generation task begins with is built with it."""
    if method is HEAD and task_kind == "generation":
        raise SpecError(
            "Head only trains what a classifier has on top of its base, and a language model has none: nothing would "
            "be trained. Choose a method that adapts the base, such as lora."
        )


def _leave_frozen(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    return model


FULL = Method(
    name="full",
    title="Full fine-tuning",
    paper="arXiv:1810.04805",
    family="full and selective",
    dimensions=(),
    learning_rate=(1e-5, 1e-3),
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={},
        target_modules=None,
        learning_rate=1e-4,
        source="above arXiv:1810.04805's rates, as short runs on MiniLM wanted",
    ),
    merges=True,
    writes_base=lambda spec: True,
    build=_unfreeze,
    why_not_peft=(
        "Full fine-tuning trains the base weights themselves and has no adapter, so there is no adapter_config.json to "
        "write. `--to trainer` writes a script for it on plain transformers."
    ),
)

HEAD = Method(
    name="head",
    title="Head only",
    paper="arXiv:1610.01644",
    family="full and selective",
    dimensions=(),
    learning_rate=(1e-3, 1e-1),
    recipe=Recipe(settings={}, target_modules=None, learning_rate=3e-2, source="measured on short MiniLM runs"),
    merges=True,
    searched=False,
    build=_leave_frozen,
    why_not_peft=(
        "A head on a frozen base has no adapter, so there is no adapter_config.json to write. On an unquantized base "
        "`--to trainer` writes a script for it on plain transformers."
    ),
)
