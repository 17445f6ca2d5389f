"""Updates made of the base weights themselves: multiples of them, or mixtures in a decomposition of them."""

from __future__ import annotations

from autopeft.methods.base import UNQUANTIZED, BuildContext, Method, PeftCall, Recipe, choice, floats, integers
from autopeft.methods.low_rank import GROUPS, MEASURED, on_linears, on_targets
from autopeft.records import TrialSpec


def _hira(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_targets("HiraConfig", context, r=int(spec.settings["rank"]), hira_dropout=float(spec.settings["dropout"]))


def _peanut(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_linears(
        "PeanutConfig",
        context,
        r=int(spec.settings["rank"]),
        depth=int(spec.settings["depth"]),
        act_fn=str(spec.settings["activation"]),
        scaling=float(spec.settings["scale"]),
    )


def _tinylora(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_targets(
        "TinyLoraConfig",
        context,
        r=int(spec.settings["rank"]),
        u=int(spec.settings["vector_length"]),
        weight_tying=float(spec.settings["weight_tying"]),
        tinylora_dropout=float(spec.settings["dropout"]),
        # The frozen projections are part of what a seed draws; a rebuild must find them again.
        projection_seed=spec.seed,
    )


def _adamss(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_linears(
        "AdamssConfig",
        context,
        r=int(spec.settings["rank"]),
        num_subspaces=int(spec.settings["num_subspaces"]),
        # With more, the number of parameters would depend on how many rows of a weight fall into each cluster.
        subspace_rank=1,
        # Adaptive allocation freezes parameters on the way; here they stay those of the first step.
        use_asa=False,
        random_seed=spec.seed,
    )


def _deft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_targets(
        "DeftConfig",
        context,
        r=int(spec.settings["rank"]),
        decomposition_method=str(spec.settings["projector"]),
        deft_dropout=float(spec.settings["dropout"]),
    )


_DROPOUT = floats("dropout", 0.0, 0.3, 0.0, "dropout on the adapter's input")

HIRA = Method(
    name="hira",
    title="HiRA",
    paper="openreview.net/forum?id=TwJrTz9cRS",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 256, 32, "rank of the factor by which the base weight is multiplied elementwise"),
        _DROPOUT,
    ),
    learning_rate=(1e-3, 1e-1),
    target_modules=GROUPS,
    layer_choice=True,
    merges=True,
    recipe=Recipe(
        settings={"rank": 32, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=1e-2,
        source=f"peft's default rank; {MEASURED}",
    ),
    peft=_hira,
)

PEANUT = Method(
    name="peanut",
    title="PEANuT",
    paper="arXiv:2410.01870",
    family="low-rank",
    dimensions=(
        integers("rank", 4, 128, 32, "width of the network that maps base weights to their update"),
        integers("depth", 0, 3, 0, "hidden layers on each side of the network", log=False),
        choice("activation", ("relu", "gelu", "tanh"), "relu", "nonlinearity of the network"),
        floats("scale", 0.1, 10.0, 1.0, "factor on the update", log=True),
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D",
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 32, "depth": 0, "activation": "relu", "scale": 1.0},
        target_modules="all-linear",
        learning_rate=1e-3,
        source=f"peft's defaults; {MEASURED}",
    ),
    peft=_peanut,
)

TINYLORA = Method(
    name="tinylora",
    title="TinyLoRA",
    paper="arXiv:2602.04118",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 16, 2, "singular directions of a weight that may be mixed"),
        integers("vector_length", 1, 256, 64, "trained numbers a group of layers; above rank x rank they repeat"),
        floats("weight_tying", 0.0, 1.0, 0.0, "share of layers that go without a vector of their own"),
        _DROPOUT,
    ),
    learning_rate=(3e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 2, "vector_length": 64, "weight_tying": 0.0, "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=3e-3,
        source=f"rank 2 of arXiv:2602.04118, else peft's defaults; {MEASURED}",
    ),
    peft=_tinylora,
)

ADAMSS = Method(
    name="adamss",
    title="AdaMSS",
    paper="openreview.net/forum?id=8ZdWmpYxT0",
    family="low-rank",
    dimensions=(
        integers("rank", 16, 512, 100, "singular vectors of a weight that are clustered into subspaces"),
        integers("num_subspaces", 2, 16, 5, "clusters of a weight's outputs, each with a rank-1 update of its own"),
    ),
    learning_rate=(1e-3, 1e-1),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D",
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 100, "num_subspaces": 5},
        target_modules="all-linear",
        learning_rate=1e-2,
        source=f"peft's defaults; {MEASURED}",
    ),
    peft=_adamss,
)

DEFT = Method(
    name="deft",
    title="DEFT",
    paper="proceedings.neurips.cc/paper_files/paper/2025/hash/93a34a7138bdad95e874018d5f491cc6-Abstract-Conference.html",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 128, 8, "directions of a weight's output that are replaced"),
        choice("projector", ("relu", "qr"), "relu", "P relu(P)', or the orthogonal projector by QR"),
        _DROPOUT,
    ),
    learning_rate=(3e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 8, "projector": "relu", "dropout": 0.0},
        target_modules="all-linear",
        learning_rate=3e-3,
        source=f"peft's defaults; {MEASURED}",
    ),
    peft=_deft,
)

DECOMPOSED: tuple[Method, ...] = (HIRA, PEANUT, TINYLORA, ADAMSS, DEFT)
