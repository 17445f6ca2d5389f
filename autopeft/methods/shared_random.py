"""Low-rank updates whose factors all layers share: frozen random ones, or trained ones that each layer mixes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from autopeft.errors import SpecError
from autopeft.methods.base import UNQUANTIZED, BuildContext, Method, PeftCall, Recipe, choice, floats, integers
from autopeft.methods.low_rank import GROUPS, MEASURED, on_linears, on_targets, target_sizes
from autopeft.records import TrialSpec

if TYPE_CHECKING:
    from torch import nn

_LONGEST_VECTOR = 256
_SHORTEST_VECTOR = 16


def _vera(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_targets(
        "VeraConfig",
        context,
        r=int(spec.settings["rank"]),
        d_initial=float(spec.settings["d_initial"]),
        vera_dropout=float(spec.settings["dropout"]),
        # The frozen projections are part of what a seed draws; a rebuild must find them again.
        projection_prng_key=spec.seed,
    )


def _pvera(spec: TrialSpec, context: BuildContext) -> PeftCall:
    # No generator_seed: peft's own generators would start afresh at a resume, the trial's is in the checkpoint.
    return on_targets(
        "PveraConfig",
        context,
        r=int(spec.settings["rank"]),
        d_initial=float(spec.settings["d_initial"]),
        pvera_dropout=float(spec.settings["dropout"]),
        projection_prng_key=spec.seed,
    )


def _randlora(spec: TrialSpec, context: BuildContext) -> PeftCall:
    rank = int(spec.settings["rank"])
    return on_targets(
        "RandLoraConfig",
        context,
        r=rank,
        randlora_alpha=float(spec.settings["alpha_over_rank"]) * rank,
        randlora_dropout=float(spec.settings["dropout"]),
        sparse=spec.settings["bases"] == "sparse",
        projection_prng_key=spec.seed,
    )


def _unilora(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_targets(
        "UniLoraConfig",
        context,
        r=int(spec.settings["rank"]),
        theta_d_length=int(spec.settings["vector_length"]),
        unilora_dropout=float(spec.settings["dropout"]),
        proj_seed=spec.seed,
    )


def _vblora(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_targets(
        "VBLoRAConfig",
        context,
        r=int(spec.settings["rank"]),
        num_vectors=int(spec.settings["num_vectors"]),
        topk=int(spec.settings["topk"]),
        vblora_dropout=float(spec.settings["dropout"]),
        vector_length=choose_vector_length(size for sizes in target_sizes(context).values() for size in sizes),
    )


def choose_vector_length(widths: Iterable[int]) -> int:
    """The longest vector up to 256, peft's default, that divides every width.

    Raises SpecError where all common divisors are so short that choosing vectors costs more than it saves.
    """
    common = math.gcd(*widths) or _LONGEST_VECTOR
    length = max(divisor for divisor in range(1, _LONGEST_VECTOR + 1) if common % divisor == 0)
    if length < _SHORTEST_VECTOR:
        raise SpecError(
            f"VB-LoRA's vectors must divide the width of every target and have at least {_SHORTEST_VECTOR} entries, "
            f"but the widths' largest common divisor is {common}. Use other target modules."
        )
    return length


def _split_vblora(model: nn.Module, spec: TrialSpec) -> list[dict[str, Any]]:
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    bank = [parameter for name, parameter in trainable if "vblora_vector_bank" in name]
    others = [parameter for name, parameter in trainable if "vblora_vector_bank" not in name]
    # peft's documentation of VB-LoRA: rates of 0.01 for the logits and 0.001 for the bank.
    return [{"params": others, "lr_scale": 1.0}, {"params": bank, "lr_scale": 0.1}]


def _lily(spec: TrialSpec, context: BuildContext) -> PeftCall:
    roles, others = _group_by_role(context)
    call = on_linears(
        "LilyConfig",
        context,
        r=int(spec.settings["rank"]),
        stride_A=int(spec.settings["layers_per_a"]),
        num_B=int(spec.settings["num_b"]),
        scaling=float(spec.settings["scale"]),
    )
    return PeftCall(call.class_name, {**call.arguments, "target_modules": roles, "exclude_modules": others})


def _group_by_role(context: BuildContext) -> tuple[list[str], list[str]]:
    """Target modules and exclusions that leave the layers of one role together.

    peft shares Lily's factors among the layers that one entry of target_modules means. A full name, as the choice of
    some layers gives, would share with nobody; so entries are the part behind the layer's number.
    """
    endings = {re.split(r"(?:^|\.)\d+\.", target, maxsplit=1)[-1] for target in context.targets}
    roles = sorted(e for e in endings if not any(e != other and e.endswith("." + other) for other in endings))
    chosen = target_sizes(context)
    others = [
        name for name in context.sizes if name not in chosen and name.endswith(tuple(f".{role}" for role in roles))
    ]
    return roles, others


_DROPOUT = floats("dropout", 0.0, 0.3, 0.0, "dropout on the adapter's input")
_D_INITIAL = floats("d_initial", 1e-3, 1.0, 0.1, "initial value of the vector between the projections", log=True)

VERA = Method(
    name="vera",
    title="VeRA",
    paper="arXiv:2310.11454",
    family="low-rank",
    dimensions=(
        integers("rank", 16, 1024, 256, "rank of the frozen random projections that all layers share"),
        _D_INITIAL,
        _DROPOUT,
    ),
    learning_rate=(3e-3, 3e-1),
    target_modules=GROUPS,
    layer_choice=True,
    merges=True,
    recipe=Recipe(
        settings={"rank": 256, "d_initial": 0.1, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=3e-2,
        source=f"peft's defaults (d_initial: arXiv:2310.11454, table 6c); {MEASURED}",
    ),
    peft=_vera,
)

PVERA = Method(
    name="pvera",
    title="PVeRA",
    paper="arXiv:2512.07703",
    family="low-rank",
    dimensions=(
        integers("rank", 16, 1024, 256, "rank of the frozen random projections that all layers share"),
        _D_INITIAL,
        _DROPOUT,
    ),
    learning_rate=(3e-3, 3e-1),
    target_modules=GROUPS,
    layer_choice=True,
    merges=True,
    recipe=Recipe(
        settings={"rank": 256, "d_initial": 0.1, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=3e-2,
        source=f"peft's defaults; {MEASURED}",
    ),
    peft=_pvera,
)

RANDLORA = Method(
    name="randlora",
    title="RandLoRA",
    paper="arXiv:2502.00987",
    family="low-rank",
    dimensions=(
        integers("rank", 4, 128, 32, "rank of each frozen random base; fewer parameters train as it grows"),
        floats("alpha_over_rank", 1.0, 40.0, 20.0, "alpha divided by rank: the update's scale", log=True),
        choice("bases", ("dense", "sparse"), "dense", "uniform random bases, or bases of -1, 0 and 1"),
        _DROPOUT,
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=GROUPS,
    layer_choice=True,
    merges=True,
    recipe=Recipe(
        settings={"rank": 32, "alpha_over_rank": 20.0, "bases": "dense", "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=3e-4,
        source=f"peft's defaults; {MEASURED}",
    ),
    peft=_randlora,
)

UNILORA = Method(
    name="unilora",
    title="Uni-LoRA",
    paper="arXiv:2506.00799",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 64, 4, "rank of the update, whose entries are all drawn from one trained vector"),
        integers("vector_length", 64, 65536, 1024, "length of that vector: the trained parameters beside the head"),
        _DROPOUT,
    ),
    learning_rate=(3e-3, 3e-1),
    target_modules=GROUPS,
    layer_choice=True,
    merges=True,
    starts_as_base=False,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 4, "vector_length": 1024, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=3e-2,
        source=f"peft's default rank; {MEASURED}",
    ),
    peft=_unilora,
)

VBLORA = Method(
    name="vblora",
    title="VB-LoRA",
    paper="arXiv:2405.15179",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 32, 4, "rank of the update, whose factors are put together from vectors of one bank"),
        integers("num_vectors", 16, 2048, 256, "vectors in the bank"),
        integers("topk", 2, 6, 2, "vectors mixed into each part of a factor", log=False),
        _DROPOUT,
    ),
    learning_rate=(3e-3, 3e-1),
    target_modules=GROUPS,
    layer_choice=True,
    needs="layer widths with a common divisor of at least 16",
    merges=True,
    starts_as_base=False,
    recipe=Recipe(
        settings={"rank": 4, "num_vectors": 256, "topk": 2, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=3e-2,
        source=f"peft's defaults; {MEASURED}, the bank's a tenth of it",
    ),
    peft=_vblora,
    parameter_groups=_split_vblora,
)

LILY = Method(
    name="lily",
    title="Lily",
    paper="arXiv:2407.09946",
    family="low-rank",
    dimensions=(
        integers("rank", 4, 256, 32, "rank of the update"),
        integers("layers_per_a", 1, 8, 1, "neighbouring layers that share the factor A", log=False),
        integers("num_b", 2, 8, 2, "factors B, shared by all layers and mixed by a router", log=False),
        floats("scale", 0.1, 10.0, 1.0, "factor on the update", log=True),
    ),
    learning_rate=(3e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D; its router averages over a batch, so predictions depend on it",
    answers_alone=False,
    recipe=Recipe(
        settings={"rank": 32, "layers_per_a": 1, "num_b": 2, "scale": 1.0},
        target_modules="all-linear",
        learning_rate=3e-3,
        source=f"peft's defaults; {MEASURED}",
    ),
    peft=_lily,
)

SHARED_RANDOM: tuple[Method, ...] = (VERA, PVERA, RANDLORA, UNILORA, VBLORA, LILY)
