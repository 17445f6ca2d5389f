"""What a model is worth on a split: the loss of every example, and the task's score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from autopeft.backends.base import Score
from autopeft.backends.hf.data import Batch, TaskData, TokenizedSplit, scoring_batches
from autopeft.backends.hf.language import match_answer, write_completions
from autopeft.backends.hf.steps import SplitScores, autocast, score_batches
from autopeft.tasks.scorers import estimate_example_sd, score_predictions
from autopeft.tasks.spec import TaskSpec


def score_split(
    model: Any,
    data: TaskData,
    split: TokenizedSplit,
    *,
    batch_size: int,
    device: str,
    on_batch: Callable[[], None] = lambda: None,
) -> SplitScores:
    """Leaves the model in training mode; `on_batch` is called before each batch. Raises Diverged where a loss is not
    finite."""

    def collate(indices: list[int]) -> Batch:
        on_batch()
        return data.collate(split, indices, device)

    scores = score_batches(model, scoring_batches(split.lengths(), batch_size), collate, device=device)
    if data.task.scorer == "exact_match":
        return scores._replace(predictions=_match_all(model, data, split, batch_size, device, on_batch))
    return scores


def summarize(task: TaskSpec, split: TokenizedSplit, scores: SplitScores) -> Score:
    predictions = scores.predictions
    return Score(
        quality=score_predictions(task.scorer, split.labels, predictions),
        loss=float(scores.losses.mean()),
        num_examples=len(split.labels),
        quality_sd=_estimate_sd(task.scorer, split, predictions),
    )


def _estimate_sd(scorer: str, split: TokenizedSplit, predictions: npt.NDArray[Any]) -> float | None:
    """None for shares of examples: their quality says it already."""
    if scorer in ("accuracy", "exact_match"):
        return None
    if scorer == "token_accuracy":
        return float(np.std(predictions, ddof=1))
    return estimate_example_sd(scorer, np.asarray(split.labels), predictions)


def pack_scores(name: str, scores: SplitScores) -> dict[str, Any]:
    """As arrays for a file, under the split's name."""
    predictions = scores.predictions
    if np.issubdtype(predictions.dtype, np.integer):
        predictions = predictions.astype(np.int16)
    # float16 holds losses to three digits, far below their noise, in half the space.
    losses = np.minimum(scores.losses, 65504).astype(np.float16)
    return {f"{name}_losses": losses, f"{name}_predictions": predictions}


def _match_all(
    model: Any, data: TaskData, split: TokenizedSplit, batch_size: int, device: str, on_batch: Callable[[], None]
) -> npt.NDArray[np.float32]:
    """1 for every example whose completion the model writes by itself, else 0."""
    prompts = [split.prompt_ids(i) for i in range(len(split.features))]
    limits: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": data.task.max_new_tokens}
    model.eval()
    with autocast(device):
        texts = write_completions(model, data.tokenizer, prompts, device=device, on_batch=on_batch, **limits)
    model.train()
    matches = [match_answer(data.task, text, known) for text, known in zip(texts, split.completions, strict=True)]
    return np.array(matches, dtype=np.float32)
