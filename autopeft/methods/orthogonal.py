"""Methods that turn the frozen weights instead of adding to them: OFT, BOFT, HRA, PSOFT; and OSF, which trains what is
orthogonal to their main directions.

A rotation keeps the angles between a layer's neurons, which is where these methods suppose the pretraining to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autopeft.errors import SpecError
from autopeft.methods.base import UNQUANTIZED, BuildContext, Method, PeftCall, Recipe, choice, floats, integers
from autopeft.methods.low_rank import GROUPS, MEASURED, on_targets, target_sizes
from autopeft.records import TrialSpec

_BLOCK_SIZES = (4, 8, 16, 32, 64, 128)


def on_linears(class_name: str, context: BuildContext, **arguments: Any) -> PeftCall:
    """Like `on_targets`, for what peft puts on `nn.Linear` alone. Raises SpecError on GPT-2's transposed layers."""
    if context.transposed:
        # Some of these peft refuses, but OSF it would leave out without a word, and only the head would train.
        raise SpecError(
            f"peft's {class_name.removesuffix('Config')} is put on nn.Linear layers, but this model's layers are "
            "Conv1D, as in GPT-2. Use LoRA, IA3, FourierFT or a soft prompt on it."
        )
    return on_targets(class_name, context, **arguments)


def check_divides(setting: str, block: int, offered: Iterable[int], widths: dict[str, int]) -> None:
    """Raises SpecError where a block does not divide the width of every layer named."""
    for name, width in widths.items():
        if width % block:
            fitting = [size for size in offered if all(w % size == 0 for w in widths.values())]
            advice = f"Use {max(fitting)} or less." if fitting else "No size offered does; use other target_modules."
            raise SpecError(
                f"{setting} must divide the width of every target, but is {block} for {name} ({width}). {advice}"
            )


def _oft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    block_size = int(spec.settings["block_size"])
    # peft would warn and take another size; then the record would not say what was trained.
    widths = {name: inputs for name, (inputs, _) in target_sizes(context).items()}
    check_divides("oft.block_size", block_size, _BLOCK_SIZES, widths)
    return on_linears(
        "OFTConfig",
        context,
        oft_block_size=block_size,
        block_share=bool(spec.settings["shared_blocks"]),
        use_cayley_neumann=not spec.settings["exact"],
    )


OFT = Method(
    name="oft",
    title="OFT",
    paper="arXiv:2306.07280 (input-centric form arXiv:2506.19847)",
    family="orthogonal",
    dimensions=(
        choice("block_size", _BLOCK_SIZES, 32, "width of the rotated blocks; larger blocks train more parameters"),
        choice("shared_blocks", (False, True), False, "one rotation for all blocks of a layer"),
        choice("exact", (False, True), False, "exact Cayley transform by solving, instead of five Neumann terms"),
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D; input widths that block_size divides",
    merges=True,
    recipe=Recipe(
        settings={"block_size": 32, "shared_blocks": False, "exact": False},
        target_modules="all-linear",
        learning_rate=2e-3,
        source=f"peft's block size and Neumann terms (arXiv:2506.19847); {MEASURED}",
    ),
    peft=_oft,
)


def _boft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    block_size, factors = int(spec.settings["block_size"]), int(spec.settings["butterfly_factors"])
    # Every factor after the first joins blocks that are twice as far apart.
    span = block_size * 2 ** (factors - 1)
    widths = {name: inputs for name, (inputs, _) in target_sizes(context).items()}
    check_divides("boft.block_size x 2^(butterfly_factors - 1)", span, _BLOCK_SIZES, widths)
    return on_linears("BOFTConfig", context, boft_block_size=block_size, boft_n_butterfly_factor=factors)


BOFT = Method(
    name="boft",
    title="BOFT",
    paper="arXiv:2311.06243",
    family="orthogonal",
    dimensions=(
        choice("block_size", (4, 8, 16, 32), 8, "width of the rotated blocks of each butterfly factor"),
        integers(
            "butterfly_factors", 1, 3, 1, "sparse rotations multiplied; one is OFT with scaled outputs", log=False
        ),
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs=(
        "linear layers, not GPT-2's Conv1D; memory for a dense square matrix of each target's input width, a factor, "
        "and time for three products of such matrices a pass, however small the batch: cheap on attention, dear on "
        "wide mlp layers (of MiniLM's steps nine tenths are for its 1,536 inputs); plain peft loads adapters of "
        "several factors only where it can compile its CUDA kernel"
    ),
    merges=True,
    recipe=Recipe(
        settings={"block_size": 8, "butterfly_factors": 1},
        target_modules="all-linear",
        learning_rate=2e-3,
        source=f"blocks of arXiv:2311.06243's GLUE runs, one factor so that peft loads it anywhere; {MEASURED}",
    ),
    peft=_boft,
)


def _hra(spec: TrialSpec, context: BuildContext) -> PeftCall:
    # Without peft's Gram-Schmidt option: it removes the second of each pair, and then divides by its length.
    return on_linears("HRAConfig", context, r=int(spec.settings["rank"]))


HRA = Method(
    name="hra",
    title="HRA",
    paper="arXiv:2405.17484",
    family="orthogonal",
    dimensions=(
        # Reflections start in equal pairs, which cancel; an odd one would be left over.
        choice("rank", (2, 4, 8, 16, 32, 64), 8, "number of Householder reflections of each layer's input"),
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs=(
        "linear layers, not GPT-2's Conv1D; unquantized weights, which it multiplies anew in every pass by a dense "
        "square matrix of each target's input width; making that takes `rank` more such matrices of memory and a "
        "product of two: cheap on attention, dear on wide mlp layers"
    ),
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 8},
        target_modules="all-linear",
        learning_rate=2e-3,
        source=f"rank of arXiv:2405.17484's GLUE runs; {MEASURED}",
    ),
    peft=_hra,
)


def _psoft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    rank = int(spec.settings["rank"])
    for name, (inputs, outputs) in target_sizes(context).items():
        if rank > min(inputs, outputs):
            raise SpecError(
                f"psoft.rank must be at most the smaller side of every target, but is {rank} for {name} "
                f"({inputs} x {outputs}). Use {min(inputs, outputs)} or less."
            )
    vectors = bool(spec.settings["scaling_vectors"])
    # Alpha is left out: peft divides the frozen factors by the scale that it multiplies the update by.
    return on_linears("PsoftConfig", context, r=rank, psoft_alpha=rank, psoft_mag_a=vectors, psoft_mag_b=vectors)


PSOFT = Method(
    name="psoft",
    title="PSOFT",
    paper="openreview.net/forum?id=FSHrinMArK",
    family="orthogonal",
    dimensions=(
        integers("rank", 2, 256, 32, "width of the principal subspace that is rotated"),
        choice("scaling_vectors", (False, True), True, "also scale the subspace's coordinates before and after"),
    ),
    learning_rate=(1e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs=(
        "linear layers, not GPT-2's Conv1D; unquantized weights, of each of which it takes a full singular value "
        "decomposition whenever it is built, slow for large models; plain "
        "peft takes it again when it loads the adapter, so load that on the kind of device that it was trained on"
    ),
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"rank": 32, "scaling_vectors": True},
        target_modules="all-linear",
        learning_rate=3e-3,
        source=f"peft's defaults, of the paper's simple tasks; {MEASURED}",
    ),
    peft=_psoft,
)


def _osf(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return on_linears("OSFConfig", context, effective_rank=float(spec.settings["preserved_share"]))


OSF = Method(
    name="osf",
    title="OSF",
    paper="arXiv:2504.07097",
    family="orthogonal",
    dimensions=(
        floats(
            "preserved_share", 0.25, 0.98, 0.5, "share of each layer's singular directions, the largest, kept as is"
        ),
    ),
    learning_rate=(1e-5, 1e-3),
    target_modules=GROUPS,
    layer_choice=True,
    needs=(
        "linear layers, not GPT-2's Conv1D; unquantized weights, of each of which it takes a full singular value "
        "decomposition whenever it is built, slow for large models"
    ),
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"preserved_share": 0.5},
        target_modules="all-linear",
        learning_rate=3e-4,
        source=f"peft's half of the directions; {MEASURED}",
    ),
    peft=_osf,
)

ORTHOGONAL: tuple[Method, ...] = (OFT, BOFT, HRA, PSOFT, OSF)
