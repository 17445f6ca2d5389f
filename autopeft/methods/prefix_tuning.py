"""Prefix tuning: trained keys and values in front of every layer's own."""

from __future__ import annotations

from autopeft.methods.base import BuildContext, Method, PeftCall, Recipe, integers
from autopeft.records import TrialSpec


def _peft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return PeftCall("PrefixTuningConfig", {"num_virtual_tokens": int(spec.settings["num_virtual_tokens"])})


PREFIX_TUNING = Method(
    name="prefix_tuning",
    title="Prefix tuning",
    paper="arXiv:2101.00190",
    dimensions=(
        integers("num_virtual_tokens", 2, 64, 16, "trained positions in front of each layer's keys and values"),
    ),
    learning_rate=(1e-3, 1e-1),
    recipe=Recipe(
        settings={"num_virtual_tokens": 16},
        target_modules=None,
        learning_rate=3e-2,
        source="prefix lengths of arXiv:2101.00190; learning rate measured on short MiniLM runs",
    ),
    peft=_peft,
)
