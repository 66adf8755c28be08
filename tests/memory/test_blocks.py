"""The pool of blocks: every block in one state, adjacent blocks preferred, misuse rejected without a change."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.memory.blocks import MetadataAllocation, ReqToMetadataBlockAllocator, blocks_needed
from embferry.protocol.errors import LocalProtocolError


def test_an_allocation_knows_its_tokens_and_runs() -> None:
    allocation = MetadataAllocation((4, 5, 9, 6), 16)
    assert allocation.allocated_tokens == 64
    assert allocation.runs == ((4, 2), (9, 1), (6, 1))
    assert not allocation.adjacent
    assert MetadataAllocation((2, 3), 16).adjacent


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_needed(tokens: int, blocks: int) -> None:
    assert blocks_needed(tokens, 16) == blocks


def test_a_new_pool_allocates_adjacent_blocks() -> None:
    pool = ReqToMetadataBlockAllocator(8, 16)
    allocation = pool.alloc(40, "a")
    assert allocation == MetadataAllocation((0, 1, 2), 16)
    assert (pool.available, pool.used, pool.quarantined) == (5, 3, 0)
    assert pool.holders() == {"a": (0, 1, 2)}
    pool.check_integrity()


def test_an_allocation_that_does_not_fit_takes_nothing() -> None:
    pool = ReqToMetadataBlockAllocator(3, 4)
    assert pool.alloc(13, "a") is None
    assert pool.available == 3
    assert pool.alloc(12, "a") is not None
    assert pool.alloc(1, "b") is None
    pool.check_integrity()


def test_scattered_blocks_are_used_when_no_run_is_long_enough() -> None:
    pool = ReqToMetadataBlockAllocator(6, 1)
    assert pool.alloc_blocks(6, "a") is not None
    pool.free((0, 2, 4, 5), "a")
    allocation = pool.alloc_blocks(4, "b")
    assert allocation is not None
    assert sorted(allocation.blocks) == [0, 2, 4, 5]
    assert allocation.runs[0] == (4, 2), "the longest run first, so that there are few ranges"
    pool.check_integrity()


def test_a_run_that_fits_is_preferred_to_pieces_and_to_a_longer_run() -> None:
    pool = ReqToMetadataBlockAllocator(32, 1)
    pool.alloc_blocks(32, "a")
    pool.free((1, 3, *range(5, 9), *range(10, 26)), "a")
    allocation = pool.alloc_blocks(4, "b")
    assert allocation is not None
    assert allocation.blocks == (5, 6, 7, 8)


def test_freed_neighbours_become_one_run_again() -> None:
    pool = ReqToMetadataBlockAllocator(5, 1)
    pool.alloc_blocks(5, "a")
    for block in (1, 3, 2, 0, 4):
        pool.free((block,), "a")
        pool.check_integrity()
    allocation = pool.alloc_blocks(5, "b")
    assert allocation is not None
    assert allocation.adjacent


def test_quarantined_blocks_stay_out_until_released() -> None:
    pool = ReqToMetadataBlockAllocator(4, 1)
    pool.alloc_blocks(4, "a")
    pool.quarantine((1, 2), "a")
    assert (pool.available, pool.used, pool.quarantined) == (0, 2, 2)
    assert pool.holders() == {"a": (0, 1, 2, 3)}
    pool.check_integrity()
    assert pool.alloc_blocks(1, "b") is None
    pool.release_quarantined((2,), "a")
    assert pool.alloc_blocks(1, "b") == MetadataAllocation((2,), 1)
    pool.check_integrity()


MISUSE: list[Callable[[ReqToMetadataBlockAllocator], object]] = [
    lambda pool: pool.free((0, 0), "a"),
    lambda pool: pool.free((0, 7), "a"),
    lambda pool: pool.free((-1,), "a"),
    lambda pool: pool.free((8,), "a"),
    lambda pool: pool.free((0, 2), "a"),
    lambda pool: pool.free((1,), "a"),
    lambda pool: pool.quarantine((1,), "a"),
    lambda pool: pool.quarantine((2,), "a"),
    lambda pool: pool.release_quarantined((0,), "a"),
    lambda pool: pool.release_quarantined((1,), "b"),
    lambda pool: pool.alloc(0, "a"),
    lambda pool: pool.alloc(-5, "a"),
    lambda pool: pool.alloc_blocks(0, "a"),
]


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_rejected_and_changes_nothing(misuse: Callable[[ReqToMetadataBlockAllocator], object]) -> None:
    pool = ReqToMetadataBlockAllocator(8, 1)
    pool.alloc_blocks(2, "a")
    pool.alloc_blocks(1, "b")
    pool.quarantine((1,), "a")
    with pytest.raises(LocalProtocolError):
        misuse(pool)
    assert pool.holders() == {"a": (0, 1), "b": (2,)}
    assert (pool.available, pool.used, pool.quarantined) == (5, 2, 1)
    pool.check_integrity()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 1)])
def test_a_pool_without_blocks_is_rejected(num_blocks: int, block_size: int) -> None:
    with pytest.raises(LocalProtocolError):
        ReqToMetadataBlockAllocator(num_blocks, block_size)


def test_check_integrity_detects_a_block_in_two_states_and_a_missing_one() -> None:
    pool = ReqToMetadataBlockAllocator(4, 1)
    pool.alloc_blocks(1, "a")
    pool._quarantined[0] = "a"
    with pytest.raises(LocalProtocolError):
        pool.check_integrity()
    del pool._quarantined[0], pool._held[0]
    with pytest.raises(LocalProtocolError):
        pool.check_integrity()


def test_check_integrity_detects_runs_that_are_not_merged() -> None:
    pool = ReqToMetadataBlockAllocator(4, 1)
    pool._free.take(4)
    pool._free._add(0, 2)
    pool._free._add(2, 2)
    with pytest.raises(LocalProtocolError):
        pool.check_integrity()


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["alloc", "free", "quarantine", "release"]), st.integers(0, 3), st.integers(1, 9))
)


@given(num_blocks=st.integers(1, 24), steps=STEPS)
def test_blocks_are_conserved_and_never_shared(num_blocks: int, steps: list[Step]) -> None:
    """Compares the pool with a dict from block to (state, request)."""
    pool = ReqToMetadataBlockAllocator(num_blocks, 2)
    model: dict[int, tuple[str, int]] = {}
    for verb, req_id, size in steps:
        if verb == "alloc":
            allocation = pool.alloc_blocks(size, req_id)
            assert (allocation is None) == (size > num_blocks - len(model))
            if allocation is not None:
                assert len(set(allocation.blocks)) == size
                assert not model.keys() & set(allocation.blocks)
                model.update(dict.fromkeys(allocation.blocks, ("held", req_id)))
        else:
            place = "quarantined" if verb == "release" else "held"
            chosen = [block for block, where in model.items() if where == (place, req_id)][:size]
            call = {"free": pool.free, "quarantine": pool.quarantine, "release": pool.release_quarantined}[verb]
            call(chosen, req_id)
            for block in chosen:
                del model[block]
            if verb == "quarantine":
                model.update(dict.fromkeys(chosen, ("quarantined", req_id)))
        pool.check_integrity()
        assert pool.available == num_blocks - len(model)
        assert pool.used == sum(where == "held" for where, _ in model.values())
        assert {b: r for r, blocks in pool.holders().items() for b in blocks} == {b: r for b, (_, r) in model.items()}


@pytest.mark.timeout(0)
def test_the_cost_of_an_allocation_does_not_grow_with_the_pool() -> None:
    """Allocates single blocks while every other block is free. A walk over the runs per call would take minutes."""
    num_blocks = 100_000
    pool = ReqToMetadataBlockAllocator(num_blocks, 16)
    pool.alloc_blocks(num_blocks, "a")
    pool.free(range(0, num_blocks, 2), "a")
    start = time.thread_time()  # CPU time: other processes do not count
    for _ in range(num_blocks // 2):
        assert pool.alloc_blocks(1, "b") is not None
    for block in range(0, num_blocks, 2):
        pool.free((block,), "b")
    assert time.thread_time() - start < 20.0
    pool.check_integrity()
