"""LoRA and its switches: weight decomposition (DoRA), rank-stabilised scaling (rsLoRA), principal start (PiSSA)."""

from __future__ import annotations

from autopeft.methods.base import BuildContext, Method, PeftCall, Recipe, choice, floats, integers
from autopeft.records import TrialSpec


def _refuse(spec: TrialSpec, device_kind: str) -> str | None:
    if spec.settings["init"] == "pissa" and spec.bits < 16:
        return f"PiSSA needs an unquantized base, but bits is {spec.bits}. Use init 'default', or bits 16 (32 on CPU)."
    # Measured with bitsandbytes 0.50.2 on CPU: DoRA's weight norm reads the int8 state that the CPU kernel has freed.
    if spec.settings["dora"] and spec.bits == 8 and device_kind == "cpu":
        return "DoRA on an int8 base crashes in the CPU kernels. Use bits 4 or 32 with DoRA, or bits 8 without it."
    return None


def _peft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    rank = int(spec.settings["rank"])
    return PeftCall(
        "LoraConfig",
        {
            "r": rank,
            # Searched as a ratio, so that rank and alpha form a rectangle in the space.
            "lora_alpha": float(spec.settings["alpha_over_rank"]) * rank,
            "lora_dropout": float(spec.settings["dropout"]),
            "use_dora": bool(spec.settings["dora"]),
            "use_rslora": bool(spec.settings["rslora"]),
            # Four subspace iterations instead of a full SVD: seconds instead of minutes on large layers
            # (PiSSA, arXiv:2404.02948, section 3).
            "init_lora_weights": "pissa_niter_4" if spec.settings["init"] == "pissa" else True,
            "target_modules": list(context.targets),
            "modules_to_save": list(context.head),
        },
    )


def _writes_base(spec: TrialSpec) -> bool:
    # PiSSA moves the principal components out of the base weights into the adapter.
    return spec.settings["init"] == "pissa"


LORA = Method(
    name="lora",
    title="LoRA",
    paper="arXiv:2106.09685 (DoRA 2402.09353, rsLoRA 2312.03732, PiSSA 2404.02948)",
    dimensions=(
        integers("rank", 1, 256, 8, "rank of the update"),
        floats("alpha_over_rank", 0.25, 8.0, 2.0, "alpha divided by rank: the update's scale", log=True),
        floats("dropout", 0.0, 0.3, 0.0, "dropout on the adapter's input"),
        choice("dora", (False, True), False, "DoRA: learn magnitude and direction apart"),
        choice("rslora", (False, True), False, "rsLoRA: scale by alpha / sqrt(rank)"),
        choice(
            "init",
            ("default", "pissa"),
            "default",
            "start from zero, or from the weight's principal components (PiSSA)",
            only_if={"bits": (16, 32)},
        ),
    ),
    learning_rate=(1e-4, 1e-2),
    target_modules=("attention-qv", "attention", "mlp", "all-linear"),
    recipe=Recipe(
        settings={"rank": 8, "alpha_over_rank": 2.0, "dropout": 0.0, "dora": False, "rslora": False, "init": "default"},
        target_modules="all-linear",
        learning_rate=1e-3,
        source="all linear layers as in QLoRA (arXiv:2305.14314); learning rate measured on short MiniLM runs",
    ),
    writes_base=_writes_base,
    refuse=_refuse,
    peft=_peft,
)
