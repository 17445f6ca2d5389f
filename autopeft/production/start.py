"""Where a task's training takes an adapter over from a finished pre-training (`pretrain.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from autopeft.backends.hf.build import trainable_parameters
from autopeft.errors import RecordError
from autopeft.production.files import read_json
from autopeft.production.recipe import Recipe
from autopeft.records import digest_json

PRETRAINED = "pretraining.json"
WEIGHTS = "pretrained.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingResult:
    """What a pre-training says of itself: `pretraining.json`."""

    recipe_key: str
    """Of the recipe that the adapter was built by, lengths and rates of this stage left out: what goes on from it must
    have the same."""
    text_digest: str
    num_tokens: int
    """Of the whole text, ends of documents included."""
    block_tokens: int
    num_blocks: int
    """Trained on."""
    num_held_out: int
    """Blocks from the end of the text, never trained on."""
    steps: int
    best_step: int
    loss_before: float
    """Mean loss in nats a token of the held-out blocks, before the first step."""
    loss_after: float
    perplexity_before: float
    perplexity_after: float
    weights_digest: str
    seconds: float


def adapter_key(recipe: Recipe) -> str:
    """Identity of what a recipe builds: method, settings, targets, base, seed. Lengths and rates may differ."""
    spec = recipe.spec
    return digest_json(
        [spec.method, spec.settings, spec.target_modules, spec.bits, recipe.model, recipe.model_digest, recipe.seed]
    )


class Start(NamedTuple):
    """A pre-trained adapter."""

    tensors: dict[str, torch.Tensor]
    digest: str
    """Of the file that they are in."""
    folder: Path

    def load_into(self, model: nn.Module, head: Sequence[str]) -> None:
        """Into the task's model, whose head keeps what it was drawn with."""
        expected = {n: p for n, p in trainable_parameters(model).items() if not set(n.split(".")) & set(head)}
        # Full fine-tuning has trained the decoder's output layer too, which a classifier lacks.
        missing = sorted(expected.keys() - self.tensors.keys())
        if missing:
            raise RecordError(f"'{self.folder / WEIGHTS}' must hold the whole adapter, but lacks {missing[0]}.")
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(self.tensors[name])


def read_start(folder: Path, recipe: Recipe) -> Start:
    """Raises RecordError where the folder holds no finished pre-training of this recipe's adapter."""
    result = read_json(
        folder / PRETRAINED,
        PretrainingResult,
        missing=f"--from names a finished pre-training, which holds {PRETRAINED}, but '{folder}' does not. Make one "
        f"with: autopeft train STUDY --pick knee --stage pretrain --text FILE --out {folder}",
    )
    if recipe.pretrained not in (None, result.weights_digest):
        raise RecordError(
            f"The recipe begins with the pre-trained adapter {recipe.pretrained[:16]}, but '{folder}' holds "
            f"{result.weights_digest[:16]}. Name the folder that it was begun with."
        )
    if result.recipe_key != adapter_key(recipe):
        raise RecordError(
            f"The adapter in '{folder}' was built by another configuration, base or seed than this recipe's, so "
            "training cannot go on from there. Pre-train this recipe, with the same --seed."
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as exc:
        raise RecordError(f"'{folder}' must hold a readable {WEIGHTS}, but does not: {exc}.") from exc
    return Start(tensors, result.weights_digest, folder)
