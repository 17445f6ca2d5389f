"""Configurations to estimate and to train for a few steps."""

from __future__ import annotations

from typing import Any

from autopeft.methods import METHODS
from autopeft.records import Bits, TrialSpec


def make_recipe_spec(
    method: str, bits: Bits = 32, *, batch_size: int, optimizer: Any = "adamw", **changed: Any
) -> TrialSpec:
    """The method's recipe with some of its settings changed."""
    recipe = METHODS[method].recipe
    return TrialSpec(
        method=method,
        settings={**recipe.settings, **changed},
        target_modules=recipe.target_modules,
        bits=bits,
        learning_rate=recipe.learning_rate,
        batch_size=batch_size,
        max_steps=10,
        warmup_ratio=0.0,
        schedule="linear",
        weight_decay=0.0,
        seed=0,
        optimizer=optimizer,
    )
