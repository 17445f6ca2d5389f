"""Effective batches, divided among processes and forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """What one process computes in one forward pass."""

    rows: list[int]
    share: float
    """Of the effective batch's loss, times the processes, over which gradients are averaged."""


class Parts(torch.utils.data.Sampler[list[Part]]):
    """One process's parts of every effective batch, in order; all are of nearly equal size."""

    def __init__(
        self,
        batches: Sequence[Sequence[int]],
        count_items: Callable[[Sequence[int]], int],
        *,
        count: int,
        process: int,
        processes: int,
    ) -> None:
        assert count % processes == 0
        self._batches, self._count_items = batches, count_items
        self._count, self._process, self._processes = count, process, processes

    def __len__(self) -> int:
        return len(self._batches) * self._count // self._processes

    def __iter__(self) -> Iterator[list[Part]]:
        for batch in self._batches:
            for index in range(self._process, self._count, self._processes):
                # Neighbours in a batch are alike in length, so consecutive rows pad least.
                rows = list(batch[index * len(batch) // self._count : (index + 1) * len(batch) // self._count])
                share = self._count_items(rows) / self._count_items(batch) if self._count > 1 else 1.0
                yield [Part(rows, share * self._processes)]


class AllRows(torch.utils.data.Dataset[Part]):
    """The sampler already says everything that is in a part."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, part: Part) -> Part:
        return part
