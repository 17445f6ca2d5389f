"""QLoRA: LoRA on every linear layer of an NF4 base whose quantization constants are quantized too."""

from __future__ import annotations

from autopeft.methods.base import BuildContext, Method, PeftCall, Recipe
from autopeft.methods.lora import ALPHA_OVER_RANK, DROPOUT, LR_RATIO_B, RANK, lora_arguments, split_by_rate
from autopeft.records import TrialSpec


def _peft(spec: TrialSpec, context: BuildContext) -> PeftCall:
    return PeftCall(
        "LoraConfig", {**lora_arguments(spec, list(context.targets)), "modules_to_save": list(context.head)}
    )


QLORA = Method(
    name="qlora",
    title="QLoRA",
    paper="arXiv:2305.14314",
    family="low-rank",
    dimensions=(RANK, ALPHA_OVER_RANK, DROPOUT, LR_RATIO_B),
    learning_rate=(1e-4, 1e-2),
    # Fewer targets lose quality on a 4-bit base (the paper).
    target_modules=("all-linear",),
    layer_choice=True,
    bits=(4,),
    optimizers=("paged_adamw_8bit", "adamw"),
    needs="GPUs: optimizer states in 8 bits that are paged out when memory runs short; merging dequantizes the base",
    merges=True,
    recipe=Recipe(
        settings={"rank": 64, "alpha_over_rank": 0.25, "dropout": 0.1, "lr_ratio_b": 1.0},
        target_modules="all-linear",
        learning_rate=1e-3,
        # scripts/finetune_guanaco_7b.sh
        source="rank 64, alpha 16, dropout 0.1 of the authors' Guanaco 7B (github.com/artidoro/qlora); LoRA's rate",
    ),
    peft=_peft,
    parameter_groups=split_by_rate,
)
