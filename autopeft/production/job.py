"""What is trained and how often what is done, apart from the model and from who takes the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autopeft.backends.hf.data import Batch
from autopeft.production.checkpoints import Evaluation
from autopeft.production.options import Options
from autopeft.production.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """How often things are done, in optimizer steps."""

    evaluate: int | None
    """Search-validation is scored; None where there is none."""
    save: int
    log: int
    patience: int | None
    """Evaluations without a better one after which training stops; None goes on to the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Told to whoever shows it, about once a second and at every evaluation, by the main process alone."""

    step: int
    num_steps: int
    """Taken since the last report."""
    loss: float
    """Mean over those; 0 where there was none."""
    learning_rate: float
    evaluation: Evaluation | None = None
    is_best: bool = False
    """Whether the evaluation is the best of all sessions."""
    saved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained, apart from the model."""

    recipe: Recipe
    key: str
    """Identity of the weights that this leads to; checkpoints carry it."""
    folder: Path
    options: Options
    """Asked for; checkpoints carry them, too."""
    rhythm: Rhythm
    batches: Sequence[Sequence[int]]
    """Row indices of every step."""
    collate: Callable[[Sequence[int]], Batch]
    """Rows -> a padded batch on this process's device."""
    count_items: Callable[[Sequence[int]], int]
    """What the loss is a mean over: rows of a classifier, tokens of a language model."""
    evaluate: Callable[[nn.Module, int], Evaluation] | None
    """(model, step) -> the score on search-validation; called by all processes at once."""
    tell: Callable[[Progress], None]
