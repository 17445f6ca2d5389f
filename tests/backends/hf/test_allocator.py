"""The simulated caching allocator: what it reserves, and that it hands out no byte twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autopeft.backends.hf.allocator import Block, CachingAllocator

MIB = 2**20


def test_small_allocations_share_a_segment_of_2_mib():
    allocator = CachingAllocator()
    for _ in range(4096):
        allocator.allocate(512)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(512)
    assert allocator.reserved_bytes == 4 * MIB


def test_middle_sized_allocations_share_segments_of_20_mib():
    allocator = CachingAllocator()
    for _ in range(2):
        allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_large_allocations_are_rounded_up_to_2_mib():
    allocator = CachingAllocator()
    allocator.allocate(11 * MIB)
    assert allocator.reserved_bytes == 12 * MIB


def test_a_freed_block_is_used_again():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(64 * MIB))
    allocator.allocate(64 * MIB)
    assert allocator.reserved_bytes == 64 * MIB


def test_a_gap_that_is_too_small_is_wasted():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(30 * MIB))
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 70 * MIB


def test_free_neighbours_are_joined():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    for block in blocks:
        allocator.free(block)
    allocator.allocate(20 * MIB - MIB)
    # From 10 MiB on a free block of any segment will do.
    assert allocator.reserved_bytes == 20 * MIB


@given(
    st.lists(
        st.tuples(st.booleans(), st.one_of(st.integers(1, 4096), st.integers(4096, 131_072)), st.integers(0, 1 << 30)),
        max_size=200,
    )
)
def test_blocks_in_use_are_large_enough_and_never_exceed_what_is_reserved(steps):
    allocator = CachingAllocator()
    live: list[tuple[int, Block]] = []
    for is_free, units, choice in steps:
        if is_free and live:
            allocator.free(live.pop(choice % len(live))[1])
        else:
            live.append((512 * units, allocator.allocate(512 * units)))
        assert all(block.num_bytes >= num_bytes and not block.is_free for num_bytes, block in live)
        assert sum(block.num_bytes for _, block in live) <= allocator.reserved_bytes
    for _, block in live:
        allocator.free(block)
    # Everything is free again, so a run of as much fits without reserving more.
    free = sum(size for pool in (allocator._small, allocator._large) for size, _, _ in pool)
    assert free == allocator.reserved_bytes
