"""AdaLoRA: updates kept as singular triplets, the least important of which are cut until an average rank is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopeft.methods.base import BuildContext, Method, PeftCall, Recipe, Stepping, floats, integers
from autopeft.methods.lora import DROPOUT
from autopeft.methods.low_rank import MEASURED
from autopeft.records import TrialSpec

if TYPE_CHECKING:
    from torch import nn

_FEWEST_STEPS = 3
"""One before, one during and one at the end of the cut."""
_CUTS = 500
"""The authors' run on SST-2 cuts every 100 of its 50,500 steps (github.com/QingruZhang/AdaLoRA, NLU/scripts)."""


def _peft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    target_rank = int(spec.settings["rank"])
    # Equal budgets would ask for the zeroth smallest importance, which peft cannot give.
    initial_rank = max(round(float(spec.settings["initial_over_rank"]) * target_rank), target_rank + 1)
    return PeftCall(
        "AdaLoraConfig",
        {
            "target_r": target_rank,
            "init_r": initial_rank,
            # peft divides by the initial rank, and goes on doing so after the cut.
            "lora_alpha": float(spec.settings["alpha_over_initial_rank"]) * initial_rank,
            "lora_dropout": float(spec.settings["dropout"]),
            "orth_reg_weight": float(spec.settings["orthogonality"]),
            "total_step": spec.max_steps,
            "tinit": max(int(float(spec.settings["initial_share"]) * spec.max_steps), 1),
            "tfinal": int(float(spec.settings["final_share"]) * spec.max_steps),
            "deltaT": max(spec.max_steps // _CUTS, 1),
            "target_modules": list(context.targets),
            "modules_to_save": list(context.head),
        },
    )


def _refuse(spec: TrialSpec, device_kind: str) -> str | None:
    if spec.max_steps < _FEWEST_STEPS:
        return f"AdaLoRA cuts ranks over at least {_FEWEST_STEPS} steps, but max_steps is {spec.max_steps}. Raise it."
    return None


def _after_step(model: nn.Module, spec: TrialSpec, steps_done: int) -> None:
    _tuner(model).update_and_allocate(steps_done)


def _state(model: nn.Module) -> dict[str, Any]:
    allocator = _tuner(model).rankallocator
    return {
        "sensitivity": dict(allocator.exp_avg_ipt),
        "uncertainty": dict(allocator.exp_avg_unc),
        "kept": _config(model).rank_pattern,
    }


def _restore(model: nn.Module, state: dict[str, Any]) -> None:
    allocator = _tuner(model).rankallocator
    # A checkpoint may have been read on the CPU.
    devices = {name: parameter.device for name, parameter in _tuner(model).model.named_parameters()}
    allocator.exp_avg_ipt = {name: tensor.to(devices[name]) for name, tensor in state["sensitivity"].items()}
    allocator.exp_avg_unc = {name: tensor.to(devices[name]) for name, tensor in state["uncertainty"].items()}
    # Of the last step's importance only the names are read: what is not among them begins anew.
    allocator.ipt = dict(allocator.exp_avg_ipt)
    _config(model).rank_pattern = state["kept"]


def _tuner(model: nn.Module) -> Any:
    return model.base_model


def _config(model: nn.Module) -> Any:
    return _tuner(model).peft_config["default"]


ADALORA = Method(
    name="adalora",
    title="AdaLoRA",
    paper="arXiv:2303.10512",
    family="low-rank",
    dimensions=(
        integers("rank", 1, 128, 8, "average rank that is left at the end"),
        floats("initial_over_rank", 1.25, 4.0, 1.5, "rank of every update at first, as a multiple of it", log=True),
        floats("alpha_over_initial_rank", 0.25, 8.0, 2.0, "alpha divided by the initial rank: the scale", log=True),
        DROPOUT,
        floats("orthogonality", 0.01, 1.0, 0.1, "weight of the penalty that keeps triplets orthogonal", log=True),
        floats("initial_share", 0.0, 0.3, 0.1, "share of the steps before ranks are cut"),
        floats("final_share", 0.1, 0.5, 0.4, "share of the steps after the last cut"),
    ),
    learning_rate=(1e-4, 3e-2),
    target_modules=("attention-qv", "attention", "mlp", "all-linear"),
    layer_choice=True,
    merges=True,
    needs="3 steps or more; its schedule is laid out over the full length, so a trial stopped early is not yet cut",
    recipe=Recipe(
        settings={
            "rank": 8,
            "initial_over_rank": 1.5,
            "alpha_over_initial_rank": 2.0,
            "dropout": 0.0,
            "orthogonality": 0.1,
            "initial_share": 0.1,
            "final_share": 0.4,
        },
        target_modules="all-linear",
        learning_rate=3e-3,
        # SQuADv2: rank 12 cut to 8; SST-2: 6,000 steps before and 22,000 after the cut, of 50,500. Both: penalty 0.1.
        source=f"ranks, penalty and shares of the authors' scripts (github.com/QingruZhang/AdaLoRA); {MEASURED}",
    ),
    refuse=_refuse,
    peft=_peft,
    stepping=Stepping(after_step=_after_step, state=_state, restore=_restore),
)
