"""Prompt tuning: trained embeddings in front of the input."""

from __future__ import annotations

from autopeft.methods.base import BuildContext, Method, PeftCall, Recipe, integers
from autopeft.records import TrialSpec


def _peft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return PeftCall("PromptTuningConfig", {"num_virtual_tokens": int(spec.settings["num_virtual_tokens"])})


PROMPT_TUNING = Method(
    name="prompt_tuning",
    title="Prompt tuning",
    paper="arXiv:2104.08691",
    dimensions=(integers("num_virtual_tokens", 2, 64, 16, "trained embeddings in front of the input"),),
    learning_rate=(1e-3, 3e-1),
    recipe=Recipe(
        settings={"num_virtual_tokens": 16},
        target_modules=None,
        learning_rate=3e-2,
        source="prompt lengths of arXiv:2104.08691; learning rate measured on short MiniLM runs",
    ),
    peft=_peft,
)
