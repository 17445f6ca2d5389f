"""PyTorch's caching allocator, simulated: what it reserves for allocations and frees in the order they happen.

After c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.13 with default settings and one stream: blocks are cut from
segments that are never given back, small ones (up to 1 MiB) from segments of 2 MiB, larger ones from 20 MiB, and from
10 MiB on from a segment of their own. Not simulated: what happens when memory is full.
"""

from __future__ import annotations

import bisect

_MIB = 2**20
_SMALL = _MIB
"""Largest allocation from the pool of small blocks (kSmallSize)."""
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB
_OWN_SEGMENT = 10 * _MIB
"""From here on a segment holds one allocation, rounded up to 2 MiB (kMinLargeAlloc, kRoundLarge)."""
_ROUND_LARGE = 2 * _MIB
_LEAST_SMALL_REST = 512
_LEAST_LARGE_REST = _MIB
"""A block is split where more than this is left over."""


class Block:
    """A piece of a segment, free or in use, with its neighbours there."""

    __slots__ = ("after", "before", "is_free", "num_bytes", "number", "pool")

    def __init__(self, num_bytes: int, pool: list[tuple[int, int, Block]], number: int) -> None:
        self.num_bytes = num_bytes
        self.pool = pool
        self.number = number
        self.is_free = True
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """Sizes must be multiples of 512 bytes."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._small: list[tuple[int, int, Block]] = []
        self._large: list[tuple[int, int, Block]] = []
        self._next = 0

    def allocate(self, num_bytes: int) -> Block:
        """The smallest free block that is large enough, cut to size."""
        is_small = num_bytes <= _SMALL
        pool = self._small if is_small else self._large
        place = bisect.bisect_left(pool, (num_bytes, -1))
        if place < len(pool):
            block = pool.pop(place)[2]
        else:
            block = self._new_block(_segment_bytes(num_bytes), pool)
            self.reserved_bytes += block.num_bytes
        block.is_free = False
        rest = block.num_bytes - num_bytes
        if rest >= _LEAST_SMALL_REST if is_small else rest > _LEAST_LARGE_REST:
            self._split(block, num_bytes)
        return block

    def free(self, block: Block) -> None:
        """Joins it with free neighbours."""
        block.is_free = True
        for other in (block.before, block.after):
            if other is None or not other.is_free:
                continue
            other.pool.pop(bisect.bisect_left(other.pool, (other.num_bytes, other.number)))
            block.num_bytes += other.num_bytes
            if other is block.before:
                block.before = other.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = other.after
                if block.after is not None:
                    block.after.before = block
        bisect.insort(block.pool, (block.num_bytes, block.number, block))

    def _split(self, block: Block, num_bytes: int) -> None:
        rest = self._new_block(block.num_bytes - num_bytes, block.pool)
        block.num_bytes = num_bytes
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after = rest
        bisect.insort(rest.pool, (rest.num_bytes, rest.number, rest))

    def _new_block(self, num_bytes: int, pool: list[tuple[int, int, Block]]) -> Block:
        self._next += 1
        return Block(num_bytes, pool, self._next)


def _segment_bytes(num_bytes: int) -> int:
    if num_bytes <= _SMALL:
        return _SMALL_SEGMENT
    if num_bytes < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-num_bytes // _ROUND_LARGE) * _ROUND_LARGE
