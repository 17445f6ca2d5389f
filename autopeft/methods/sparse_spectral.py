"""Updates with few free numbers: coefficients of a transform (FourierFT, WaveFT, C3A), single weights (SHiRA,
Super-Tuning), rotated pairs of outputs (RoAd) and added value biases (BEFT)."""

from __future__ import annotations

from autopeft.errors import SpecError
from autopeft.methods.base import UNQUANTIZED, BuildContext, Method, PeftCall, Recipe, choice, floats, integers
from autopeft.methods.low_rank import GROUPS, MEASURED, on_targets, target_sizes
from autopeft.methods.orthogonal import check_divides, on_linears
from autopeft.records import TrialSpec

_C3A_BLOCKS = (8, 16, 32, 64, 128, 256)


def _check_coefficients(setting: str, count: int, per_layer: dict[str, int]) -> None:
    for name, most in per_layer.items():
        if count > most:
            raise SpecError(
                f"{setting} must not train more numbers of a layer than it has weights, but would train {count} of the "
                f"{most} of {name}. Use less, or other target_modules."
            )


def _weights(context: BuildContext) -> dict[str, int]:
    return {name: inputs * outputs for name, (inputs, outputs) in target_sizes(context).items()}


def _fourierft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    count = int(spec.settings["num_frequencies"])
    _check_coefficients("fourierft.num_frequencies", count, _weights(context))
    return on_targets(
        "FourierFTConfig",
        context,
        n_frequency=count,
        scaling=float(spec.settings["scaling"]),
        # From zero, not from the paper's standard normal: at this scaling that outweighs small layers' own weights.
        init_weights=True,
        random_loc_seed=spec.seed,
    )


FOURIERFT = Method(
    name="fourierft",
    title="FourierFT",
    paper="arXiv:2405.03003",
    family="sparse and spectral",
    dimensions=(
        integers("num_frequencies", 50, 10000, 1000, "trained entries of each layer's spectrum"),
        floats("scaling", 10.0, 500.0, 150.0, "factor on the update after the inverse transform", log=True),
    ),
    learning_rate=(1e-3, 3e-1),
    target_modules=GROUPS,
    layer_choice=True,
    needs="targets with at least num_frequencies weights each; merging needs unquantized weights",
    merges=True,
    recipe=Recipe(
        settings={"num_frequencies": 1000, "scaling": 150.0},
        target_modules="all-linear",
        learning_rate=3e-2,
        source=f"frequencies and scaling of arXiv:2405.03003's GLUE runs; {MEASURED}",
    ),
    peft=_fourierft,
)


def _waveft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    count = int(spec.settings["num_coefficients"])
    _check_coefficients("waveft.num_coefficients", count, _weights(context))
    return on_targets(
        "WaveFTConfig",
        context,
        n_frequency=count,
        scaling=float(spec.settings["scaling"]),
        wavelet_family=str(spec.settings["wavelet"]),
        random_loc_seed=spec.seed,
    )


WAVEFT = Method(
    name="waveft",
    title="WaveFT",
    paper="arXiv:2505.12532",
    family="sparse and spectral",
    dimensions=(
        integers("num_coefficients", 50, 10000, 1000, "trained wavelet coefficients of each layer's update"),
        floats("scaling", 1.0, 100.0, 25.0, "factor on the update after the inverse transform", log=True),
        choice("wavelet", ("db1", "db4", "sym4", "coif1"), "db1", "wavelet family; db1 is Haar's and the fastest"),
    ),
    learning_rate=(1e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="targets with at least num_coefficients weights each; merging needs unquantized weights",
    merges=True,
    recipe=Recipe(
        settings={"num_coefficients": 1000, "scaling": 25.0, "wavelet": "db1"},
        target_modules="all-linear",
        learning_rate=1e-3,
        source=f"peft's scaling and wavelet; {MEASURED}",
    ),
    peft=_waveft,
)


def _c3a(spec: TrialSpec, context: BuildContext) -> PeftCall:
    block_size = int(spec.settings["block_size"])
    sizes = target_sizes(context)
    widths = {f"{name}'s inputs": inputs for name, (inputs, _) in sizes.items()}
    widths |= {f"{name}'s outputs": outputs for name, (_, outputs) in sizes.items()}
    check_divides("c3a.block_size", block_size, _C3A_BLOCKS, widths)
    # From zero, so that training starts at the base; peft's default is Xavier's uniform.
    return on_linears("C3AConfig", context, block_size=block_size, init_weights=True)


C3A = Method(
    name="c3a",
    title="C3A",
    paper="arXiv:2407.19342",
    family="sparse and spectral",
    dimensions=(
        choice("block_size", _C3A_BLOCKS, 32, "width of the circulant blocks; larger blocks train fewer parameters"),
    ),
    learning_rate=(1e-3, 3e-1),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D; widths that block_size divides; unquantized weights",
    merges=True,
    # Quantized layers return views, which peft 0.21.2 adds to in place: autograd refuses that.
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"block_size": 32},
        target_modules="all-linear",
        learning_rate=3e-2,
        source=f"block sizes near width / 8 as peft advises; {MEASURED}",
    ),
    peft=_c3a,
)


def _shira(spec: TrialSpec, context: BuildContext) -> PeftCall:
    rank = int(spec.settings["rank"])
    for name, (inputs, outputs) in target_sizes(context).items():
        _check_coefficients("shira.rank", rank * (inputs + outputs), {name: inputs * outputs})
    return on_linears("ShiraConfig", context, r=rank, random_seed=spec.seed)


SHIRA = Method(
    name="shira",
    title="SHiRA",
    paper="arXiv:2406.13175",
    family="sparse and spectral",
    dimensions=(
        integers("rank", 1, 64, 8, "trains as many single weights of each layer as LoRA of this rank has parameters"),
    ),
    learning_rate=(1e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D; no int8 weights",
    merges=True,
    # On int8 it multiplies by dequantized weights where the base multiplies integers: another model from the start.
    bits=(4, 16, 32),
    recipe=Recipe(
        settings={"rank": 8},
        target_modules="all-linear",
        learning_rate=1e-3,
        source=f"a random mask of one to two percent (arXiv:2406.13175); {MEASURED}",
    ),
    peft=_shira,
)


def _supertuning(spec: TrialSpec, context: BuildContext) -> PeftCall:
    density, rank = float(spec.settings["density"]), int(spec.settings["rank"])
    for name, weights in _weights(context).items():
        if int(weights * density) < 1:
            raise SpecError(
                f"supertuning.density must leave every target a trained weight, but {density} of {name}'s {weights} "
                f"leaves none. Use {1 / weights:.1g} or more."
            )
    hybrid = {"r": rank, "lora_alpha": 2.0 * rank} if rank else {}
    return on_linears(
        "SupertuningConfig",
        context,
        sparsity=1 - density,
        select_top=spec.settings["magnitude"] == "largest",
        **hybrid,
    )


SUPERTUNING = Method(
    name="supertuning",
    title="Super-Tuning",
    paper="arXiv:2607.09287",
    family="sparse and spectral",
    dimensions=(
        floats("density", 0.001, 0.1, 0.01, "share of each layer's weights that is trained", log=True),
        choice("magnitude", ("largest", "smallest"), "largest", "which weights are trained"),
        integers("rank", 0, 64, 0, "rank of a LoRA beside them (the paper's Supra); 0 for none", log=False),
    ),
    learning_rate=(3e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D; unquantized weights, which it ranks by magnitude",
    merges=True,
    bits=UNQUANTIZED,
    recipe=Recipe(
        settings={"density": 0.01, "magnitude": "largest", "rank": 0},
        target_modules="all-linear",
        learning_rate=1e-2,
        source=f"the best single mechanism of arXiv:2607.09287; {MEASURED}",
    ),
    peft=_supertuning,
)


def _road(spec: TrialSpec, context: BuildContext) -> PeftCall:
    # Outputs are rotated in pairs; how far apart a pair's members lie matters to the speed of inference alone, where
    # 64 is best (peft, road/config.py).
    outputs = {name: width for name, (_, width) in target_sizes(context).items()}
    fitting = [size for size in (64, 32, 16, 8, 4, 2) if all(width % size == 0 for width in outputs.values())]
    if not fitting:
        odd = next(name for name, width in outputs.items() if width % 2)
        raise SpecError(f"RoAd rotates outputs in pairs, but {odd} has {outputs[odd]}. Use other target_modules.")
    return on_linears("RoadConfig", context, variant=f"road_{spec.settings['variant']}", group_size=fitting[0])


ROAD = Method(
    name="road",
    title="RoAd",
    paper="arXiv:2409.00119",
    family="scaling",
    dimensions=(
        choice("variant", (1, 2, 4), 1, "numbers shared within a rotated pair of outputs: 1 all, 2 half, 4 none"),
    ),
    learning_rate=(3e-4, 3e-2),
    target_modules=GROUPS,
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D; even output widths",
    merges=True,
    recipe=Recipe(
        settings={"variant": 1},
        target_modules="all-linear",
        learning_rate=3e-3,
        source=f"variant of arXiv:2409.00119 with the fewest parameters; {MEASURED}",
    ),
    peft=_road,
)


def _beft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    # Where query, key and value are one layer, the bias lies on all three.
    values = (*context.roles["value"], *context.roles["qkv"])
    return on_linears("BeftConfig", context._replace(targets=values))


BEFT = Method(
    name="beft",
    title="BEFT",
    paper="arXiv:2509.15974",
    family="full and selective",
    dimensions=(),
    learning_rate=(1e-3, 1e-1),
    layer_choice=True,
    needs="linear layers, not GPT-2's Conv1D; peft can merge it only where the value projection has a bias",
    recipe=Recipe(
        settings={},
        target_modules=None,
        learning_rate=3e-2,
        source=f"biases of the value projections as in arXiv:2509.15974; {MEASURED}",
    ),
    peft=_beft,
)

SPARSE_SPECTRAL: tuple[Method, ...] = (FOURIERFT, WAVEFT, C3A, SHIRA, SUPERTUNING, ROAD, BEFT)
