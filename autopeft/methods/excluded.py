"""peft's types that are no row of the table, and why. A test holds every type of the installed peft to be one or the
other."""

from __future__ import annotations

EXCLUDED: dict[str, str] = {
    "CPT": (
        "it trains the embeddings of examples written into the prompt, with what each of their tokens is for; the user "
        "gives them for one model and task, and no search can know them"
    ),
    "FROD": "saved and loaded by peft 0.21.2, it gives other logits than it was trained to",
    "MULTITASK_PROMPT_TUNING": "it shares one prompt between several tasks, and a study has one",
    "POLY": "it routes between adapters by the number of the task, and a study has one task",
    "SHADOW": (
        "it trains a second decoder as wide as the base, and of that a part (what advances the shadow past the last "
        "block) never gets a gradient in peft 0.21.2"
    ),
    "TRAINABLE_TOKENS": "it trains the embeddings of tokens that the user lists, and no search can know which",
    "XLORA": "it learns to mix LoRA adapters that have been trained before, and a study starts with none",
}
"""Names of `peft.PeftType` with the reason, as a clause."""

EXCLUDED_STARTS: dict[str, str] = {
    "CORDA": (
        "a start for LoRA that decomposes weights by the activations of data which the user chooses for it, and a "
        "study has its task's rows alone"
    ),
    "GAUSSIAN": "a start for LoRA that differs from the default in the distribution of its random numbers alone",
    "LOFTQ": (
        "a start for LoRA from what quantization takes away, for which the unquantized weights must be at hand beside "
        "the quantized ones, and which peft 0.21.2 computes on a GPU alone (utils/loftq_utils.py moves every weight to "
        "CUDA); on 4 and 8 bits LoRA starts from zero"
    ),
    "MICA": "a start for LoRA that freezes B, and that needs a full decomposition of every weight",
    "ORTHOGONAL": "a start for LoRA that differs from the default in how its random numbers are drawn alone",
}
"""The same for values of `init_lora_weights` in peft's `LoraConfig`; `lora.init` has the others."""

LEFT_OUT: dict[str, str] = {**EXCLUDED, **EXCLUDED_STARTS}
"""What listings tell of."""
