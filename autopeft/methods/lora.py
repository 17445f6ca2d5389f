"""LoRA and its switches: how it starts (PiSSA, OLoRA, EVA), is scaled (rsLoRA), split up (DoRA) and stepped (LoRA+)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopeft.errors import SpecError
from autopeft.methods import eva
from autopeft.methods.base import BuildContext, Method, PeftCall, Recipe, RowStart, choice, floats, integers
from autopeft.methods.targets import ends_with
from autopeft.records import TrialSpec

if TYPE_CHECKING:
    from torch import nn

_TITLES = {"pissa": "PiSSA", "olora": "OLoRA"}
"""Starts that are taken from the weights, and change them."""

RANK = integers("rank", 1, 256, 8, "rank of the update")
ALPHA_OVER_RANK = floats("alpha_over_rank", 0.25, 8.0, 2.0, "alpha divided by rank: the update's scale", log=True)
DROPOUT = floats("dropout", 0.0, 0.3, 0.0, "dropout on the adapter's input")
LR_RATIO_B = floats(
    "lr_ratio_b", 1.0, 32.0, 1.0, "LoRA+: learning rate of B over that of all else; 1 is plain LoRA", log=True
)


def lora_arguments(spec: TrialSpec, targets: list[str]) -> dict[str, Any]:
    """The part of a LoraConfig that every row with a LoRA in it has."""
    rank = int(spec.settings["rank"])
    return {
        "r": rank,
        # Searched as a ratio, so that rank and alpha form a rectangle in the space.
        "lora_alpha": float(spec.settings["alpha_over_rank"]) * rank,
        "lora_dropout": float(spec.settings["dropout"]),
        "target_modules": targets,
    }


def split_by_rate(model: nn.Module, spec: TrialSpec) -> list[dict[str, Any]]:
    """LoRA+ (arXiv:2402.12354): B learns faster than A, because features are learned efficiently only if it does."""
    ratio = float(spec.settings["lr_ratio_b"])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if ratio == 1:
        return [{"params": list(trainable.values()), "lr_scale": 1.0}]
    in_b = {name: p for name, p in trainable.items() if ".lora_B." in name}
    rest = [p for name, p in trainable.items() if name not in in_b]
    return [{"params": rest, "lr_scale": 1.0}, {"params": list(in_b.values()), "lr_scale": ratio}]


def _refuse(spec: TrialSpec, device_kind: str) -> str | None:
    title = _TITLES.get(str(spec.settings["init"]))
    if title is not None and spec.bits < 16:
        return (
            f"{title} needs an unquantized base, but bits is {spec.bits}. Use init 'default', or bits 16 (32 on CPU)."
        )
    # Measured with bitsandbytes 0.50.2 on CPU: DoRA's weight norm reads the int8 state that the CPU kernel has freed.
    if spec.settings["dora"] and spec.bits == 8 and device_kind == "cpu":
        return "DoRA on an int8 base crashes in the CPU kernels. Use bits 4 or 32 with DoRA, or bits 8 without it."
    return None


def _check_decomposition(title: str, rank: int, context: BuildContext) -> None:
    """Raises SpecError where the weights cannot be split as the initialisation wants to."""
    if title == "OLoRA" and context.transposed:
        # peft 0.21.2 takes Q for B without looking which way round the weight is (LoraLayer.olora_init).
        raise SpecError("OLoRA does not fit GPT-2's transposed linear layers in peft. Use init 'default' or 'pissa'.")
    for name, size in context.sizes.items():
        if any(ends_with(name, target) for target in context.targets) and rank > min(size):
            raise SpecError(
                f"{title} takes its start from the weights, so lora.rank may be at most {min(size)} on {name}, but is "
                f"{rank}. Lower the rank or use init 'default'."
            )


def _check_directions(rank: int, context: BuildContext) -> None:
    """Raises SpecError where a layer's inputs have fewer directions than EVA is to find."""
    for name, (num_inputs, _) in context.sizes.items():
        if any(ends_with(name, target) for target in context.targets) and rank > num_inputs:
            raise SpecError(
                f"EVA finds directions of a layer's inputs, so lora.rank may be at most {num_inputs} on {name}, but is "
                f"{rank}. Lower the rank or use init 'default'."
            )


def _peft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    init, rank = str(spec.settings["init"]), int(spec.settings["rank"])
    if init in _TITLES:
        _check_decomposition(_TITLES[init], rank, context)
    elif init == "eva":
        _check_directions(rank, context)
    # Four subspace iterations instead of a full SVD: seconds instead of minutes on large layers
    # (peft's documentation of `pissa_niter_4`).
    in_peft: dict[str, dict[str, Any]] = {
        "default": {"init_lora_weights": True},
        "pissa": {"init_lora_weights": "pissa_niter_4"},
        "olora": {"init_lora_weights": "olora"},
        "eva": eva.PEFT_ARGUMENTS,
    }
    return PeftCall(
        "LoraConfig",
        {
            **lora_arguments(spec, list(context.targets)),
            "use_dora": bool(spec.settings["dora"]),
            "use_rslora": bool(spec.settings["rslora"]),
            **in_peft[init],
            "modules_to_save": list(context.head),
        },
    )


def _writes_base(spec: TrialSpec) -> bool:
    # Both move a part of the base weights into the adapter.
    return spec.settings["init"] in _TITLES


LORA = Method(
    name="lora",
    title="LoRA",
    paper="arXiv:2106.09685 (DoRA 2402.09353, rsLoRA 2312.03732, PiSSA 2404.02948, OLoRA 2406.01775, EVA 2410.07170, "
    "LoRA+ 2402.12354)",
    family="low-rank",
    dimensions=(
        RANK,
        ALPHA_OVER_RANK,
        DROPOUT,
        choice("dora", (False, True), False, "DoRA: learn magnitude and direction apart"),
        choice("rslora", (False, True), False, "rsLoRA: scale by alpha / sqrt(rank)"),
        choice(
            "init",
            ("default", "pissa", "olora", "eva"),
            "default",
            "start at random, from the weight's principal components (PiSSA) or its QR decomposition (OLoRA), or from "
            "the principal components of its inputs on training rows (EVA)",
            only_if={"bits": (16, 32)},
        ),
        LR_RATIO_B,
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=("attention-qv", "attention", "mlp", "all-linear"),
    layer_choice=True,
    merges=True,
    needs="PiSSA and OLoRA: an unquantized base with no target narrower than the rank; OLoRA: no Conv1D (GPT-2); "
    "EVA: up to 10 batches of training rows before the first step, or as much in smaller ones, no target with fewer "
    "inputs than the rank",
    recipe=Recipe(
        settings={
            "rank": 8,
            "alpha_over_rank": 2.0,
            "dropout": 0.0,
            "dora": False,
            "rslora": False,
            "init": "default",
            "lr_ratio_b": 1.0,
        },
        target_modules="all-linear",
        learning_rate=1e-3,
        source="all linear layers as in QLoRA (arXiv:2305.14314); learning rate measured on short MiniLM runs",
    ),
    writes_base=_writes_base,
    refuse=_refuse,
    peft=_peft,
    parameter_groups=split_by_rate,
    start=RowStart(count_tokens=eva.count_tokens, begin=eva.begin_with_activations),
)
