"""LoRA on attention and a parallel adapter on the feed-forward, together: after the mix-and-match adapter.

That adapter (arXiv:2110.04366) gives most parameters to parallel updates of the feed-forward (512 wide) and few to
attention (30); there it has prefix tuning, which in its unified view is close to LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopeft.errors import SpecError
from autopeft.methods.base import BuildContext, Method, Recipe, floats, integers
from autopeft.methods.bottleneck import PARALLEL_SCALE, put_beside_feed_forward
from autopeft.methods.lora import ALPHA_OVER_RANK, DROPOUT, LR_RATIO_B, RANK, lora_arguments, split_by_rate
from autopeft.methods.targets import GROUPS
from autopeft.records import TrialSpec

if TYPE_CHECKING:
    from torch import nn


def _build(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    import peft

    attention = [name for role in GROUPS["attention-qv"] for name in context.roles[role]]
    if not attention:
        raise SpecError(
            "LoRA with a parallel adapter is put on query and value projections, of which this model has none that are "
            "known by name. Use lora with target_modules all-linear."
        )
    peft.inject_adapter_in_model(peft.LoraConfig(**lora_arguments(spec, attention)), model)
    put_beside_feed_forward(
        model,
        context,
        size=int(spec.settings["bottleneck_size"]),
        activation="relu",
        scale=float(spec.settings["scale"]),
    )
    return model


LORA_BOTTLENECK = Method(
    name="lora_bottleneck",
    title="LoRA with a parallel adapter",
    paper="arXiv:2110.04366",
    family="adapter",
    dimensions=(
        RANK,
        ALPHA_OVER_RANK,
        DROPOUT,
        LR_RATIO_B,
        integers("bottleneck_size", 2, 256, 32, "width of the adapter beside the feed-forward"),
        floats("scale", 0.5, 8.0, PARALLEL_SCALE, "factor on that adapter's update", log=True),
    ),
    learning_rate=(1e-4, 1e-2),
    layer_choice=True,
    needs="query, value and dense feed-forward projections that are known by name",
    recipe=Recipe(
        settings={
            "rank": 8,
            "alpha_over_rank": 2.0,
            "dropout": 0.0,
            "lr_ratio_b": 1.0,
            "bottleneck_size": 32,
            "scale": PARALLEL_SCALE,
        },
        target_modules=None,
        learning_rate=1e-3,
        source="placement and scale of arXiv:2110.04366; sizes and rate of LoRA's and bottleneck's",
    ),
    build=_build,
    parameter_groups=split_by_rate,
    why_not_peft=(
        "peft has no bottleneck adapter, so an adapter_config.json cannot express the combination. Export another "
        "pick: LoRA on all linear layers is the nearest method that peft has."
    ),
)
