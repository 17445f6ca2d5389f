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
