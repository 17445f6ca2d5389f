"""Training a few of the base's own parameters: its biases (BitFit), or its normalisation layers' weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopeft.errors import SpecError
from autopeft.methods.base import UNQUANTIZED, BuildContext, Method, PeftCall, Recipe
from autopeft.methods.targets import choose_layers
from autopeft.records import TrialSpec

if TYPE_CHECKING:
    from torch import nn


def find_biases(model: nn.Module, context: BuildContext) -> dict[str, nn.Parameter]:
    """By name, outside the head."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and name.split(".")[0] not in context.head and not name.startswith(context.unread)
    }


def _unfreeze_biases(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    biases = find_biases(model, context)
    if not biases:
        raise SpecError(
            "BitFit trains bias terms, but this model has none: Llama, T5 and ModernBERT are built without. "
            "Use ln_tuning, which trains as few parameters, or lora."
        )
    for name in choose_layers(spec.target_modules, list(biases)):
        biases[name].requires_grad_(True)
    return model


def _tune_norms(spec: TrialSpec, context: BuildContext) -> PeftCall:
    if not context.norms:
        raise SpecError("LayerNorm tuning trains normalisation layers with weights, but this model has none. Use lora.")
    return PeftCall("LNTuningConfig", {"target_modules": list(context.norms), "modules_to_save": list(context.head)})


BITFIT = Method(
    name="bitfit",
    title="BitFit",
    paper="arXiv:2106.10199",
    family="full and selective",
    dimensions=(),
    learning_rate=(1e-4, 1e-1),
    layer_choice=True,
    merges=True,
    # bitsandbytes' 4-bit layers cast their bias in place to the input's type, which would round its updates away.
    bits=UNQUANTIZED,
    needs="bias terms in the base, which BERT, RoBERTa, GPT-2 and BART have, and Llama, T5 and ModernBERT have not",
    recipe=Recipe(
        settings={},
        target_modules=None,
        learning_rate=3e-3,
        source="all biases, at a rate above full fine-tuning's, as in arXiv:2106.10199",
    ),
    build=_unfreeze_biases,
    why_not_peft=(
        "BitFit trains the base's own biases and has no adapter, so there is no adapter_config.json to write. "
        "`--to trainer` writes a script for it on plain transformers."
    ),
)

LN_TUNING = Method(
    name="ln_tuning",
    title="LayerNorm tuning",
    paper="arXiv:2312.11420",
    family="full and selective",
    dimensions=(),
    learning_rate=(1e-4, 1e-1),
    layer_choice=True,
    # peft 0.21.2 puts the trained layers into the base, but leaves its wrapper around the head.
    merges=False,
    needs="LayerNorm or RMSNorm layers with weights",
    recipe=Recipe(
        settings={},
        target_modules=None,
        learning_rate=1e-2,
        source="every normalisation layer, as in arXiv:2312.11420; learning rate of BitFit's order, not yet measured",
    ),
    peft=_tune_norms,
)
