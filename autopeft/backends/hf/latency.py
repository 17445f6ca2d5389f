"""How long a model takes to answer, measured so that two can be compared on a machine that does other things too.

Models take turns on the same batches, the one that begins alternating, and medians are kept: a neighbour slows all of
them alike, and a hiccup none. Forward passes alone are timed; loading, tokenizing and padding are not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from autopeft.backends.hf.data import Batch, Rows, scoring_batches
from autopeft.backends.hf.steps import autocast
from autopeft.records import Latency

_WARM_UP_BATCHES = 2
_FEWEST_BATCHES = 5
_MOST_BATCHES = 31
_MOST_SECONDS = 3.0
"""For one kind of batch and model; at least the fewest batches are timed however long they take."""


def measure_latencies(models: Sequence[Any], rows: Rows, *, batch_size: int) -> list[Latency]:
    """Of each model, on rows spread evenly over the lengths that a split has.

    Leaves the models in the mode that they were in.
    """
    batch_size = min(batch_size, len(rows.lengths))
    training = [model.training for model in models]
    for model in models:
        model.eval()
    single = _time_models(models, scoring_batches(rows.lengths, 1), rows)
    several = [batch for batch in scoring_batches(rows.lengths, batch_size) if len(batch) == batch_size]
    together = _time_models(models, several, rows)
    for model, was_training in zip(models, training, strict=True):
        model.train(was_training)
    return [
        Latency(
            single_seconds=statistics.median(alone),
            batch_seconds=statistics.median(full) / batch_size,
            batch_size=batch_size,
            num_batches=min(len(alone), len(full)),
        )
        for alone, full in zip(single, together, strict=True)
    ]


@torch.no_grad()
def _time_models(models: Sequence[Any], batches: Sequence[Sequence[int]], rows: Rows) -> list[list[float]]:
    """Seconds of each batch, by model."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(_WARM_UP_BATCHES):
        for model in models:
            _time_forward(model, rows.collate(batches[len(batches) // 2]), rows.device)
    for turn, index in enumerate(_spread(len(batches))):
        if turn >= _FEWEST_BATCHES and sum(map(sum, seconds)) > _MOST_SECONDS * len(models):
            break
        batch = rows.collate(batches[index])
        # Whoever is second finds weights that both share in the cache.
        order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))
        for place in order:
            seconds[place].append(_time_forward(models[place], batch, rows.device))
    return seconds


def _spread(count: int) -> list[int]:
    """Places in a sorted list, evenly spread, in an order in which the first few are so too."""
    places = max(min(count, _MOST_BATCHES), _FEWEST_BATCHES)
    # The golden ratio's multiples fill [0, 1) evenly at every length.
    return [int(count * ((0.5 + turn * 0.6180339887498949) % 1.0)) for turn in range(places)]


def _time_forward(model: Any, batch: Batch, device: str) -> float:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    _wait(device)
    started = time.perf_counter()
    with autocast(device):
        model(**inputs)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
