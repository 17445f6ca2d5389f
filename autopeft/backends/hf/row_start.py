"""What some methods read of the task before their first step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from autopeft.backends.hf.data import Batch, Rows
from autopeft.backends.hf.steps import autocast
from autopeft.methods import find_method
from autopeft.records import TrialSpec

MOST_BATCHES = 10
"""peft's EVA goes on until the last direction of the last layer has settled: 39 batches of sst2 for MiniLM at rank 8,
which took as long as 70 training steps."""


def start_from_rows(model: Any, spec: TrialSpec, rows: Rows) -> None:
    """Shows a method that wants it some training rows. Leaves the model in training mode, and the random state as it
    was. A trial that resumes has what came of it in its checkpoint."""
    start = find_method(spec.method).start
    fewest = start.count_tokens(spec) if start is not None else 0
    if start is None or not fewest:
        return
    planned = plan_start(rows.lengths, batch_size=spec.batch_size, fewest_tokens=fewest, seed=spec.seed)
    model.eval()
    with torch.no_grad(), autocast(rows.device):
        start.begin(model, spec, (_without_labels(rows.collate(indices)) for indices in planned))
    model.train()


def plan_start(lengths: Sequence[int], *, batch_size: int, fewest_tokens: int, seed: int) -> Iterator[list[int]]:
    """Batches of rows in a random order, again from the first when all were there: as many rows as a training step
    takes, and more where those have too few tokens."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    position = 0
    for _ in range(MOST_BATCHES):
        rows: list[int] = []
        tokens = 0
        while len(rows) < min(batch_size, len(order)) or tokens < fewest_tokens:
            rows.append(order[position % len(order)])
            tokens += lengths[rows[-1]]
            position += 1
        yield rows


def _without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
