"""Scores of a split, computed by one process or by all of them, each on its share of the rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from autopeft.backends.hf.data import TaskData, TokenizedSplit
from autopeft.backends.hf.scoring import score_split
from autopeft.backends.hf.steps import SplitScores


@contextlib.contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Takes away meanwhile what accelerate puts around a model's forward for bfloat16, which turns whole logits into
    float32: more memory and time than the model itself needs, or a trial took."""
    wrapped, own = vars(model).get("forward"), vars(model).get("_original_forward")
    if own is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


def join_splits(first: TokenizedSplit, second: TokenizedSplit) -> TokenizedSplit:
    columns: Any = zip(first, second, strict=True)
    return TokenizedSplit(*(a + b for a, b in columns))


def take_rows(split: TokenizedSplit, rows: list[int]) -> TokenizedSplit:
    columns: Any = split
    return TokenizedSplit(*([column[i] for i in rows] if column else column for column in columns))


def score_everywhere(model: Any, data: TaskData, split: TokenizedSplit, *, batch_size: int, device: str) -> SplitScores:
    """`score_split` by all processes, which must call it at once; each gets all scores."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return score_split(model, data, split, batch_size=batch_size, device=device)
    process, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    num_rows = len(split.features)
    # Sharded models need as many forward passes everywhere, so the last shares are filled up with the first row.
    each = math.ceil(num_rows / processes)
    rows = [i if i < num_rows else 0 for i in range(process, each * processes, processes)]
    own = score_split(model, data, take_rows(split, rows), batch_size=batch_size, device=device)
    shares: list[Any] = [None] * processes
    torch.distributed.all_gather_object(shares, (own.losses, own.predictions))
    merged = []
    for column in range(2):
        values = np.empty(each * processes, dtype=shares[0][column].dtype)
        for other, share in enumerate(shares):
            values[other::processes] = share[column]
        merged.append(values[:num_rows])
    return SplitScores(*merged)
