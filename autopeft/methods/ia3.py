"""IA3: learned vectors that rescale keys, values and the feed-forward's inner activations."""

from __future__ import annotations

from autopeft.methods.base import BuildContext, Method, PeftCall, Recipe, choice
from autopeft.methods.low_rank import MEASURED
from autopeft.records import TrialSpec


def _peft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    feedforward = list(context.roles["mlp-out"]) if spec.settings["feedforward"] else []
    # Where query, key and value are one layer, the vector rescales all three.
    attention = [*context.roles["key"], *context.roles["value"], *context.roles["qkv"]]
    return PeftCall(
        "IA3Config",
        {
            "target_modules": [*attention, *feedforward],
            "feedforward_modules": feedforward,
            "modules_to_save": list(context.head),
        },
    )


IA3 = Method(
    name="ia3",
    title="IA3",
    paper="arXiv:2205.05638",
    family="scaling",
    dimensions=(choice("feedforward", (False, True), True, "also rescale the feed-forward's inner activations"),),
    learning_rate=(1e-3, 1e-1),
    layer_choice=True,
    needs="merging needs unquantized weights",
    merges=True,
    recipe=Recipe(
        settings={"feedforward": True},
        target_modules=None,
        learning_rate=3e-2,
        source=f"placement of arXiv:2205.05638; {MEASURED}",
    ),
    peft=_peft,
)
