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

NUM_BATCHES = 10
"""And more where they have to be small, until as many rows and tokens were shown. peft's EVA goes on until the last
direction of the last layer has settled: 39 batches of sst2 for MiniLM at rank 8, as long as 70 training steps."""
_READING_SHARE = 4
"""Tokens, padding included, in a batch that is only read, for one of the largest batch to train on. Reading keeps a few
tensors at a time and logits in bfloat16, of 2 bytes. Training keeps about ten tensors of every layer, and of a language
model's logits 12 bytes each: in bfloat16 and float32, with a gradient of either. So it needs no more than training."""
_LEAST_SHARE = 1 / 8
"""Of the tokens that a method wants in a batch: with fewer, EVA would have fewer tokens than directions."""


def start_from_rows(model: Any, spec: TrialSpec, rows: Rows, *, micro_batch: int | None = None) -> None:
    """Shows a method that wants it some training rows, as many at a time as training in micro-batches of so many (a
    whole batch where it is None) has the memory for. Leaves the model in training mode, and the random state as it was.
    A trial that resumes has what came of it in its checkpoint."""
    start = find_method(spec.method).start
    fewest = start.count_tokens(spec) if start is not None else 0
    if start is None or not fewest:
        return
    planned = plan_start(
        rows.lengths, batch_size=spec.batch_size, micro_batch=micro_batch, fewest_tokens=fewest, seed=spec.seed
    )
    model.eval()
    with torch.no_grad(), autocast(rows.device):
        start.begin(model, spec, (_without_labels(rows.collate(indices)) for indices in planned))
    model.train()


def plan_start(
    lengths: Sequence[int], *, batch_size: int, fewest_tokens: int, seed: int, micro_batch: int | None = None
) -> Iterator[list[int]]:
    """Batches of rows in a random order, again from the first when all were there: as many rows as a training step
    takes, and more where those have too few tokens, as far as that needs no more memory than training; where it would,
    there are more batches instead."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    trained = min(batch_size, micro_batch or batch_size, len(order))
    size = min(batch_size, _READING_SHARE * trained, len(order))
    most_tokens = _READING_SHARE * trained * max(lengths)
    position = batches = seen = 0
    fewest_rows = NUM_BATCHES * min(batch_size, len(order))
    while batches < NUM_BATCHES or position < fewest_rows or seen < NUM_BATCHES * fewest_tokens:
        rows: list[int] = []
        tokens = longest = 0
        while True:
            row = order[position % len(order)]
            padded = (len(rows) + 1) * max(longest, lengths[row])
            enough = fewest_tokens * (_LEAST_SHARE if padded > most_tokens else 1)
            if len(rows) >= size and tokens >= enough:
                break
            rows.append(row)
            tokens, longest = tokens + lengths[row], max(longest, lengths[row])
            position += 1
        batches, seen = batches + 1, seen + tokens
        yield rows


def _without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
