"""Task metrics that work offline, from labels and predictions."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
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
        metric = _load_hub_metric(name)
        try:
            result = metric.compute(references=labels.tolist(), predictions=predictions.tolist())
            return float(next(iter(result.values())))
        except Exception as exc:  # somebody else's code
            raise TaskError(
                f"A metric of the hub must make one number of predicted classes and right ones, but 'hub:{name}' makes "
                f"none: {exc}. Take another scorer, such as {', '.join(SCORERS)}."
            ) from exc

    return score


@cache
def _load_hub_metric(name: str) -> Any:
    # `evaluate` takes seconds to import, and asks the hub at each load whether the metric's code is still the same.
    import evaluate
    from evaluate.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        return evaluate.load(name)
    except Exception as exc:  # an unrelated type for each way in which a metric cannot be had
        raise TaskError(
            f"The scorer 'hub:{name}' is a metric that is fetched from the hub, evaluate-metric/{name} there, but it "
            f"cannot be loaded ({type(exc).__name__}). Check the name, install what the metric imports, connect once, "
            f"or take another scorer, such as {', '.join(SCORERS)}."
        ) from exc


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
    examples: the jackknife's (Efron and Stein 1981).

    Labels (N,) and predictions (N,) are class indices. 0 for fewer than two examples.
    """
    if len(labels) < 2:
        return 0.0
    influences = _measure_influences(scorer, labels, predictions)
    return math.sqrt(float(influences @ influences) / (len(labels) - 1))


def resample_scores(scorer: str, labels: Labels, predictions: Numbers, rows: npt.NDArray[np.int64]) -> Numbers:
    """(R,) qualities on the examples of each of `rows` (R, N), to first order in how often each is drawn.

    Exact for means over examples. Other scorers would be asked R times, and some take milliseconds for an answer; the
    jackknife asks once for each distinct pair of label and prediction (Efron 1982, The Jackknife, the Bootstrap and
    Other Resampling Plans, chapter 6).
    """
    quality = score_predictions(scorer, labels, predictions)
    influences = _measure_influences(scorer, labels, predictions)
    resampled: Numbers = quality + influences[rows].mean(axis=1)
    return resampled


def _measure_influences(scorer: str, labels: Labels, predictions: Numbers) -> Numbers:
    """(N,) that sum to 0: how far the quality of all lies above that without the example, times N - 1."""
    if scorer == "accuracy" or scorer in GENERATION_SCORERS:
        scores = predictions if scorer in GENERATION_SCORERS else labels == predictions
        centred: Numbers = scores - np.mean(scores)
        return centred
    pairs = np.column_stack([labels, predictions])
    _, places, inverse = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    without = np.array([score_predictions(scorer, *np.delete(pairs, place, axis=0).T) for place in places])
    by_example = without[inverse.reshape(-1)]
    influences: Numbers = (len(labels) - 1) * (by_example.mean() - by_example)
    return influences
