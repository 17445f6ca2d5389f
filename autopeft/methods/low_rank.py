"""LoRA's relatives that learn other products of factors: elementwise, Kronecker, normalised, blockwise, shared rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopeft.errors import SpecError
from autopeft.methods.base import UNQUANTIZED, BuildContext, Method, PeftCall, Recipe, choice, floats, integers
from autopeft.records import Bits, TrialSpec

GROUPS = ("attention-qv", "attention", "mlp", "all-linear")
MEASURED = "learning rate as in leaderboards/sst2/minilm-recipes.md"
"""Where one short run with each recipe stands."""


def on_targets(class_name: str, context: BuildContext, **arguments: Any) -> PeftCall:
    """The call that puts an adapter on the targets and trains the head beside it."""
    return PeftCall(
        class_name, {**arguments, "target_modules": list(context.targets), "modules_to_save": list(context.head)}
    )


def on_linears(class_name: str, context: BuildContext, **arguments: Any) -> PeftCall:
    """Like `on_targets`, for what peft puts on `nn.Linear` alone. Raises SpecError on GPT-2's transposed layers."""
    if context.transposed:
        raise SpecError(
            f"peft's {class_name.removesuffix('Config')} is put on nn.Linear layers, but this model's layers are "
            "Conv1D, as in GPT-2. Use LoRA, HiRA or VeRA on it."
        )
    return on_targets(class_name, context, **arguments)


def target_sizes(context: BuildContext) -> dict[str, tuple[int, int]]:
    """Full names of the targets with their (input, output) features, by peft's rule for endings."""
    return {
        name: size
        for name, size in context.sizes.items()
        if any(name == target or name.endswith("." + target) for target in context.targets)
    }


def _loha(spec: TrialSpec, context: BuildContext) -> PeftCall:
    rank = int(spec.settings["rank"])
    return on_linears(
        "LoHaConfig",
        context,
        r=rank,
        alpha=float(spec.settings["alpha_over_rank"]) * rank,
        rank_dropout=float(spec.settings["rank_dropout"]),
    )


def _lokr(spec: TrialSpec, context: BuildContext) -> PeftCall:
    rank = int(spec.settings["rank"])
    return on_linears(
        "LoKrConfig",
        context,
        r=rank,
        alpha=float(spec.settings["alpha_over_rank"]) * rank,
        rank_dropout=float(spec.settings["rank_dropout"]),
        decompose_factor=int(spec.settings["factor"]),
    )


def _delora(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_linears(
        "DeloraConfig",
        context,
        r=int(spec.settings["rank"]),
        delora_lambda=float(spec.settings["norm_bound"]),
        module_dropout=float(spec.settings["dropout"]),
    )


def _gralora(spec: TrialSpec, context: BuildContext) -> PeftCall:
    blocks = int(spec.settings["blocks"])
    for name, (num_inputs, num_outputs) in target_sizes(context).items():
        if num_inputs % blocks or num_outputs % blocks:
            raise SpecError(
                f"GraLoRA's blocks must divide the width of every target, but blocks is {blocks} and {name} maps "
                f"{num_inputs} features to {num_outputs}. Use fewer blocks or other target modules."
            )
    rank = int(spec.settings["block_rank"]) * blocks
    return on_targets(
        "GraloraConfig",
        context,
        # Searched inside a block, because peft's rank must be divisible by the number of blocks.
        r=rank,
        gralora_k=blocks,
        alpha=float(spec.settings["alpha_over_rank"]) * rank,
        gralora_dropout=float(spec.settings["dropout"]),
    )


def _glora(spec: TrialSpec, context: BuildContext) -> PeftCall:
    paths = str(spec.settings["paths"])
    # On a layer without bias, peft leaves out the paths that change it (C, D, E).
    return on_linears(
        "GloraConfig",
        context,
        r=int(spec.settings["rank"]),
        config_A_B=paths,
        config_C=paths,
        config_D_E="constant" if paths == "lora" else "vector",
    )


def _miss(spec: TrialSpec, context: BuildContext) -> PeftCall:
    rank = int(spec.settings["rank"])
    for name, (num_inputs, _) in target_sizes(context).items():
        if rank > num_inputs:
            raise SpecError(
                f"MiSS's rank cannot exceed the input width of a target, but rank is {rank} and {name} has "
                f"{num_inputs} input features. Use a smaller rank or other target modules."
            )
    return on_linears("MissConfig", context, r=rank, miss_dropout=float(spec.settings["dropout"]))


# Their update needs the weight's shape alone, which int8 keeps and NF4 does not (measured with peft 0.21.2).
_UP_FROM_8: tuple[Bits, ...] = (8, 16, 32)
_DROPOUT = floats("dropout", 0.0, 0.3, 0.0, "dropout on the adapter's input")
_ALPHA_OVER_RANK = floats("alpha_over_rank", 0.25, 8.0, 1.0, "alpha divided by rank: the update's scale", log=True)
_RANK_DROPOUT = floats("rank_dropout", 0.0, 0.3, 0.0, "share of the update's output rows left out in a training step")

LOHA = Method(
    name="loha",
    title="LoHa",
    paper="arXiv:2108.06098",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 64, 8, "rank of each of the two products whose elementwise product is the update"),
        _ALPHA_OVER_RANK,
        _RANK_DROPOUT,
    ),
    learning_rate=(5e-4, 5e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D",
    merges=True,
    bits=_UP_FROM_8,
    recipe=Recipe(
        settings={"rank": 8, "alpha_over_rank": 1.0, "rank_dropout": 0.0},
        target_modules="all-linear",
        learning_rate=1e-2,
        source=f"peft's defaults; {MEASURED}",
    ),
    peft=_loha,
)

LOKR = Method(
    name="lokr",
    title="LoKr",
    paper="arXiv:2309.14859",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 64, 8, "rank of the large Kronecker factor, which is kept whole from half its width on"),
        choice("factor", (2, 4, 8, 16), 8, "width of the small Kronecker factor, where it divides the layer's"),
        _ALPHA_OVER_RANK,
        _RANK_DROPOUT,
    ),
    learning_rate=(1e-3, 1e-1),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D",
    merges=True,
    bits=_UP_FROM_8,
    recipe=Recipe(
        settings={"rank": 8, "factor": 8, "alpha_over_rank": 1.0, "rank_dropout": 0.0},
        target_modules="all-linear",
        learning_rate=1e-2,
        source=f"peft's default rank, on a large factor of an eighth of the width; {MEASURED}",
    ),
    peft=_lokr,
)

DELORA = Method(
    name="delora",
    title="DeLoRA",
    paper="arXiv:2503.18225",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 128, 8, "rank of the update"),
        # The update has this norm from the first step on. With peft's 15, MiniLM did not recover in 50 steps.
        floats("norm_bound", 0.1, 30.0, 1.0, "initial bound on the update's norm, learned (lambda)", log=True),
        _DROPOUT,
    ),
    learning_rate=(3e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D",
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 8, "norm_bound": 1.0, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=3e-3,
        source=f"peft's default rank; norm bound and {MEASURED}",
    ),
    peft=_delora,
)

GRALORA = Method(
    name="gralora",
    title="GraLoRA",
    paper="arXiv:2505.20355",
    family="low-rank",
    dimensions=(
        integers("block_rank", 1, 64, 16, "rank of the update inside each of the blocks x blocks parts of a weight"),
        choice("blocks", (2, 4, 8), 2, "parts into which inputs and outputs are each cut"),
        floats("alpha_over_rank", 0.25, 8.0, 2.0, "alpha divided by rank: the update's scale", log=True),
        _DROPOUT,
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="layer widths that `blocks` divides",
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"block_rank": 16, "blocks": 2, "alpha_over_rank": 2.0, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=1e-3,
        source=f"peft's defaults (rank 32 in 2 x 2 blocks, alpha 64); {MEASURED}",
    ),
    peft=_gralora,
)

GLORA = Method(
    name="glora",
    title="GLoRA",
    paper="arXiv:2306.07967",
    family="low-rank",
    dimensions=(
        replace(
            integers("rank", 1, 128, 8, "rank of the multiplicative and of the additive update"),
            only_if={"paths": ("lora",)},
        ),
        choice(
            "paths", ("lora", "vector"), "lora", "weights and biases change by low-rank matrices, or by one vector each"
        ),
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D",
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 8, "paths": "lora"},
        target_modules="all-linear",
        learning_rate=3e-3,
        source=f"peft's defaults; {MEASURED}",
    ),
    peft=_glora,
)

MISS = Method(
    name="miss",
    title="MiSS",
    paper="arXiv:2409.15371",
    family="low-rank",
    dimensions=(
        integers("rank", 2, 256, 64, "rows of the trained matrix, each for every rank-th input"),
        _DROPOUT,
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D, with at least `rank` inputs",
    merges=True,
    recipe=Recipe(
        settings={"rank": 64, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=1e-3,
        source=f"peft's default rank; {MEASURED}",
    ),
    peft=_miss,
)

LOW_RANK: tuple[Method, ...] = (LOHA, LOKR, DELORA, GRALORA, GLORA, MISS)
