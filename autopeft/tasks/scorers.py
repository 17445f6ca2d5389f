"""Task metrics that work offline, from labels and predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from autopeft.errors import TaskError, suggest_nearest
from autopeft.records import TaskKind

Labels = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[Any]


def _accuracy(labels: Labels, predictions: Labels) -> float:
    return float(np.mean(labels == predictions))


def _matthews_correlation(labels: Labels, predictions: Labels) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _f1_macro(labels: Labels, predictions: Labels) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def _f1_binary(labels: Labels, predictions: Labels) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, zero_division=0))


def _hub_metric(name: str) -> Callable[[Labels, Labels], float]:
    def score(labels: Labels, predictions: Labels) -> float:
        # `evaluate` takes seconds to import, and fetches the metric's code from the hub: only where a task asks for it.
        import evaluate

        result = evaluate.load(name).compute(references=labels.tolist(), predictions=predictions.tolist())
        return float(next(iter(result.values())))

    return score


SCORERS: dict[str, Callable[[Labels, Labels], float]] = {
    "accuracy": _accuracy,
    "matthews_correlation": _matthews_correlation,
    "f1_macro": _f1_macro,
    "f1_binary": _f1_binary,
}
"""By name; larger is better. `hub:NAME` takes any metric of the `evaluate` package instead."""


GENERATION_SCORERS: dict[str, str] = {
    "token_accuracy": "share of a completion's tokens that the model would write next, given those before",
    "exact_match": "whether what the model writes by itself, always the likeliest token, is the completion or answer",
}
"""By name, with what an example's score is, in [0, 1]; the quality is the mean over examples."""

DEFAULT_SCORERS: dict[TaskKind, str] = {"classification": "accuracy", "generation": "token_accuracy"}


def check_scorer(name: str, kind: TaskKind = "classification") -> None:
    """Raises TaskError for a scorer that does not exist, or not for this kind of task."""
    if kind == "generation":
        if name not in GENERATION_SCORERS:
            of_other = f" '{name}' scores classes." if name in SCORERS or name.startswith("hub:") else ""
            raise TaskError(
                f"There is no scorer '{name}' for generation.{of_other} {suggest_nearest(name, GENERATION_SCORERS)}"
            )
    elif name in GENERATION_SCORERS:
        raise TaskError(f"The scorer '{name}' is for tasks of kind: generation. {suggest_nearest(name, SCORERS)}")
    elif name not in SCORERS and not name.startswith("hub:"):
        raise TaskError(
            f"There is no scorer '{name}'. {suggest_nearest(name, SCORERS)} A metric of the hub is written hub:NAME."
        )


def score_predictions(scorer: str, labels: Sequence[int] | Labels, predictions: Sequence[float] | Numbers) -> float:
    """Quality of predictions, larger is better. Labels (N,) and predictions (N,) are class indices; for a scorer of
    generation predictions are the examples' scores, and labels say nothing."""
    if scorer in GENERATION_SCORERS:
        return float(np.mean(predictions))
    check_scorer(scorer)
    function = SCORERS[scorer] if scorer in SCORERS else _hub_metric(scorer.removeprefix("hub:"))
    return function(np.asarray(labels), np.asarray(predictions))


def estimate_example_sd(scorer: str, labels: Labels, predictions: Numbers) -> float:
    """The spread over examples that makes sd / sqrt(N) the quality's standard error, for scorers that are no mean over
    examples: the jackknife's (Efron and Stein 1981), which leaves out each distinct pair of label and prediction once.

    Labels (N,) and predictions (N,) are class indices. 0 for fewer than two examples.
    """
    if len(labels) < 2:
        return 0.0
    pairs = np.column_stack([labels, predictions])
    _, places, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    without = np.array([score_predictions(scorer, *np.delete(pairs, place, axis=0).T) for place in places])
    squares = counts @ (without - np.average(without, weights=counts)) ** 2
    return math.sqrt((len(labels) - 1) * float(squares))
