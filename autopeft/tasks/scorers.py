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
from autopeft.wording import first_line

_MOST_COUNTS = 4_000_000
"""At a time, so that a task with hundreds of classes takes megabytes."""

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
            value = float(next(iter(result.values())))
        except Exception as exc:  # somebody else's code
            raise TaskError(
                f"A metric of the hub must make one number of predicted classes and right ones, but 'hub:{name}' makes "
                f"none: {exc}. Take another scorer, such as {', '.join(SCORERS)}."
            ) from exc
        if math.isinf(value):
            raise TaskError(
                f"A metric of the hub must make a finite number, but 'hub:{name}' makes {value}. Take another scorer, "
                f"such as {', '.join(SCORERS)}."
            )
        # Correlations say so of answers that are all the same; ours are 0 there.
        return 0.0 if math.isnan(value) else value

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
            f"cannot be loaded ({type(exc).__name__}: {first_line(exc)}). Check the name, "
            f"install what the metric imports, connect once, or take another scorer, such as {', '.join(SCORERS)}."
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
    """(R,) qualities on the examples of each of `rows` (R, N).

    Exact for our own scorers: they are means over examples, or functions of how often each class was given for each,
    which is counted for all resamples together. A metric of the hub would be asked R times, and takes milliseconds for
    an answer, so it is told to first order in how often each example is drawn: the jackknife asks once for each
    distinct pair of label and prediction (Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans,
    chapter 6).
    """
    if scorer == "accuracy":
        return np.asarray((labels == predictions)[rows].mean(axis=1))
    if scorer in GENERATION_SCORERS:
        return np.asarray(predictions[rows].mean(axis=1), dtype=np.float64)
    if scorer in _OF_COUNTS:
        size = 1 + int(max(labels.max(), predictions.max(), 1))
        cells = labels.astype(np.int64) * size + predictions.astype(np.int64)
        together = max(1, _MOST_COUNTS // size**2)
        parts = (_count_pairs(cells, rows[start : start + together], size) for start in range(0, len(rows), together))
        return np.concatenate([*(_OF_COUNTS[scorer](counts) for counts in parts), []])
    quality = score_predictions(scorer, labels, predictions)
    influences = _measure_influences(scorer, labels, predictions)
    resampled: Numbers = quality + influences[rows].mean(axis=1)
    return resampled


def _measure_influences(scorer: str, labels: Labels, predictions: Numbers) -> Numbers:
    """(N,) that sum to 0: how far the quality of all lies above that without the example, times N - 1."""
    pairs = np.column_stack([labels, predictions])
    _, places, inverse = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    without = np.array([score_predictions(scorer, *np.delete(pairs, place, axis=0).T) for place in places])
    by_example = without[inverse.reshape(-1)]
    influences: Numbers = (len(labels) - 1) * (by_example.mean() - by_example)
    return influences


def _count_pairs(cells: npt.NDArray[np.int64], rows: npt.NDArray[np.integer[Any]], size: int) -> Numbers:
    """(R, C, C): how often each class (the second) was given for each (the first) in each resample."""
    places = np.arange(len(rows))[:, None] * size**2 + cells[rows]
    counts = np.bincount(places.ravel(), minlength=len(rows) * size**2)
    return counts.reshape(len(rows), size, size).astype(np.float64)


def _count_f1(counts: Numbers) -> tuple[Numbers, Numbers]:
    """(R, C) of each class against the others, 0 for one that is not there, and whether it is there."""
    right = np.einsum("rcc->rc", counts)
    both = counts.sum(axis=1) + counts.sum(axis=2)
    return np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0), both > 0


def _count_f1_macro(counts: Numbers) -> Numbers:
    values, is_there = _count_f1(counts)
    return np.asarray(values.sum(axis=1) / is_there.sum(axis=1))


def _count_f1_binary(counts: Numbers) -> Numbers:
    return _count_f1(counts)[0][:, 1]


def _count_matthews(counts: Numbers) -> Numbers:
    """The multiclass one (Gorodkin, doi:10.1016/j.compbiolchem.2004.09.006); 0 where all answers or labels are one."""
    given, true = counts.sum(axis=1), counts.sum(axis=2)
    total = counts.sum(axis=(1, 2))
    together = np.einsum("rcc->r", counts) * total - (given * true).sum(axis=1)
    spread = (total**2 - (given**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1))
    return np.asarray(np.divide(together, np.sqrt(spread), out=np.zeros_like(spread), where=spread > 0))


_OF_COUNTS: dict[str, Callable[[Numbers], Numbers]] = {
    "matthews_correlation": _count_matthews,
    "f1_macro": _count_f1_macro,
    "f1_binary": _count_f1_binary,
}
"""(R, C, C) counts, as `_count_pairs` makes them -> (R,) scores."""
