"""Trained vectors that the model reads before the text: in front of the input (prompt tuning, P-tuning) or as keys and
values in front of every layer's own (prefix tuning, P-tuning v2, cartridges), or beside them (LLaMA-Adapter).

peft hands the first kind to the model as embeddings and the second as `past_key_values`; not every model takes them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autopeft.errors import SpecError
from autopeft.methods.base import BuildContext, Method, PeftCall, Recipe, choice, integers
from autopeft.methods.low_rank import MEASURED
from autopeft.records import TrialSpec

if TYPE_CHECKING:
    from torch import nn

# transformers finds a row's last token by its ids, which it does not see here (GenericForSequenceClassification).
# autopeft finds it by the mask (`answer_from_last_token`).
_TAKES_EMBEDDINGS = (
    "a model that takes embeddings for ids. Trained decoders must be given rows of one length by plain transformers, "
    "which would classify shorter ones from their padding"
)
_TAKES_KEYS = "a model that takes keys and values from outside: BERT, RoBERTa, ELECTRA and decoders, not ModernBERT"


def _call(class_name: str, spec: TrialSpec, context: BuildContext, **arguments: Any) -> PeftCall:
    # Left to itself, peft would train `classifier` and `score` only: half the head of DistilBERT or ModernBERT.
    shared = {"num_virtual_tokens": int(spec.settings["num_virtual_tokens"]), "modules_to_save": list(context.head)}
    return PeftCall(class_name, arguments | shared)


def _prefix_tuning(spec: TrialSpec, context: BuildContext) -> PeftCall:
    if not spec.settings["projection"]:
        return _call("PrefixTuningConfig", spec, context)
    size = int(spec.settings["projection_size"])
    return _call("PrefixTuningConfig", spec, context, prefix_projection=True, encoder_hidden_size=size)


PREFIX_TUNING = Method(
    name="prefix_tuning",
    title="Prefix tuning",
    paper="arXiv:2101.00190",
    family="soft prompt",
    dimensions=(
        integers("num_virtual_tokens", 2, 64, 16, "trained positions in front of each layer's keys and values"),
        choice("projection", (False, True), False, "train them through a two-layer network, as the paper does"),
        replace(integers("projection_size", 16, 1024, 512, "width of that network"), only_if={"projection": (True,)}),
    ),
    learning_rate=(1e-3, 1e-1),
    models=("encoder", "decoder"),
    needs=_TAKES_KEYS,
    starts_as_base=False,
    recipe=Recipe(
        settings={"num_virtual_tokens": 16, "projection": False, "projection_size": 512},
        target_modules=None,
        learning_rate=3e-2,
        source=f"prefix lengths of arXiv:2101.00190; {MEASURED}",
    ),
    peft=_prefix_tuning,
)

P_TUNING_V2 = Method(
    name="p_tuning_v2",
    title="P-tuning v2",
    paper="arXiv:2110.07602",
    family="soft prompt",
    # Prefix tuning without the network, at the lengths of language understanding: the paper's table of settings goes
    # to 128, where prefix tuning's stops.
    dimensions=(integers("num_virtual_tokens", 4, 128, 20, "trained positions in every layer (deep prompts)"),),
    learning_rate=(1e-3, 1e-1),
    models=("encoder", "decoder"),
    needs=_TAKES_KEYS,
    starts_as_base=False,
    recipe=Recipe(
        settings={"num_virtual_tokens": 20},
        target_modules=None,
        learning_rate=1e-2,
        source=f"a short prompt, as arXiv:2110.07602 advises for easy tasks; {MEASURED}",
    ),
    peft=lambda spec, context: _call("PrefixTuningConfig", spec, context),
)

CARTRIDGE = Method(
    name="cartridge",
    title="Cartridge",
    paper="arXiv:2506.06266",
    family="soft prompt",
    dimensions=(
        integers("num_virtual_tokens", 8, 128, 16, "positions in front of each layer's keys and values"),
        integers("num_frozen_tokens", 0, 4, 1, "first positions that stay as drawn, as an attention sink", log=False),
    ),
    learning_rate=(1e-3, 1e-1),
    models=("encoder", "decoder"),
    needs=_TAKES_KEYS,
    starts_as_base=False,
    recipe=Recipe(
        settings={"num_virtual_tokens": 16, "num_frozen_tokens": 1},
        target_modules=None,
        learning_rate=1e-2,
        source=f"one frozen position as in arXiv:2506.06266, drawn at random; {MEASURED}",
    ),
    peft=lambda spec, context: _call(
        "CartridgeConfig", spec, context, num_frozen_tokens=int(spec.settings["num_frozen_tokens"])
    ),
)

PROMPT_TUNING = Method(
    name="prompt_tuning",
    title="Prompt tuning",
    paper="arXiv:2104.08691",
    family="soft prompt",
    dimensions=(
        integers("num_virtual_tokens", 2, 64, 16, "trained embeddings in front of the input"),
        choice("init", ("random", "vocabulary"), "random", "start from noise, or from embeddings of words drawn"),
    ),
    learning_rate=(1e-3, 3e-1),
    models=("encoder", "decoder"),
    needs=_TAKES_EMBEDDINGS,
    starts_as_base=False,
    recipe=Recipe(
        settings={"num_virtual_tokens": 16, "init": "random"},
        target_modules=None,
        learning_rate=3e-2,
        source=f"prompt lengths of arXiv:2104.08691; {MEASURED}",
    ),
    peft=lambda spec, context: _call(
        "PromptTuningConfig",
        spec,
        context,
        prompt_tuning_init="SAMPLE_VOCAB" if spec.settings["init"] == "vocabulary" else "RANDOM",
    ),
)


def _p_tuning(spec: TrialSpec, context: BuildContext) -> PeftCall:
    arguments: dict[str, Any] = {
        "encoder_reparameterization_type": str(spec.settings["encoder"]).upper(),
        "encoder_hidden_size": int(spec.settings["encoder_size"]),
    }
    return _call("PromptEncoderConfig", spec, context, **arguments)


P_TUNING = Method(
    name="p_tuning",
    title="P-tuning",
    paper="arXiv:2103.10385",
    family="soft prompt",
    dimensions=(
        integers("num_virtual_tokens", 2, 64, 16, "trained embeddings in front of the input"),
        choice("encoder", ("mlp", "lstm"), "mlp", "network that the embeddings are trained through"),
        integers("encoder_size", 16, 1024, 128, "width of that network"),
    ),
    learning_rate=(1e-4, 1e-1),
    models=("encoder", "decoder"),
    needs=_TAKES_EMBEDDINGS,
    starts_as_base=False,
    recipe=Recipe(
        settings={"num_virtual_tokens": 16, "encoder": "mlp", "encoder_size": 128},
        target_modules=None,
        learning_rate=1e-2,
        source=f"the encoders of arXiv:2103.10385 as peft has them; {MEASURED}",
    ),
    peft=_p_tuning,
)


def _build_adaption_prompt(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    """By peft's own modules, but not through its `get_peft_model`, which would leave a classifier's head frozen."""
    import peft
    from peft.tuners.adaption_prompt import AdaptionPromptModel

    num_layers = int(getattr(model.config, "num_hidden_layers", 0))
    if spec.target_modules is not None:
        num_layers = int(spec.target_modules.removeprefix("last-"))
    config = peft.AdaptionPromptConfig(adapter_len=int(spec.settings["num_virtual_tokens"]), adapter_layers=num_layers)
    try:
        # It freezes the model and wraps its attention in place.
        AdaptionPromptModel(model, {"default": config}, "default")
    except ValueError as exc:
        raise SpecError(f"peft has LLaMA-Adapter for Llama, Mistral and GPT-2 only: {exc}") from exc
    return model


ADAPTION_PROMPT = Method(
    name="adaption_prompt",
    title="LLaMA-Adapter",
    paper="arXiv:2303.16199",
    family="soft prompt",
    dimensions=(integers("num_virtual_tokens", 2, 64, 10, "trained positions beside each layer's own, behind a gate"),),
    learning_rate=(1e-3, 1e-1),
    layer_choice=True,
    models=("decoder",),
    needs="Llama, Mistral or GPT-2",
    recipe=Recipe(
        settings={"num_virtual_tokens": 10},
        target_modules=None,
        learning_rate=1e-2,
        source="prompt length of arXiv:2303.16199, in all layers; learning rate of the other prompts, not measured",
    ),
    build=_build_adaption_prompt,
    why_not_peft=(
        "peft's configuration of LLaMA-Adapter has no place for the head of a classifier, which is trained beside it. "
        "Export another pick: prefix tuning is the nearest method that peft can save with a head."
    ),
)

PROMPTS: tuple[Method, ...] = (PREFIX_TUNING, P_TUNING_V2, P_TUNING, PROMPT_TUNING, CARTRIDGE, ADAPTION_PROMPT)
