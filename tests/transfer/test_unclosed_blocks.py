"""Blocks of a transport that has failed and cannot be closed return to the pool only when it has been closed."""

from __future__ import annotations

import pytest

from embferry.memory.blocks import ReqToMetadataBlockAllocator
from embferry.transfer.guarded_transport import GuardedTransport
from embferry.transfer.unclosed_blocks import UnclosedBlocks
from embferry.transports.in_memory.transport import InMemoryTransport

ROOM = 7


class Unclosable(InMemoryTransport):
    """A transport that cannot close blocks, nor be closed until it is mended."""

    is_broken = True

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        raise RuntimeError("broken")

    def close(self) -> None:
        if self.is_broken:
            raise RuntimeError("cannot be closed")
        super().close()


@pytest.fixture
def allocator() -> ReqToMetadataBlockAllocator:
    return ReqToMetadataBlockAllocator(8, 4)


def test_its_blocks_are_kept_until_it_is_closed(allocator: ReqToMetadataBlockAllocator) -> None:
    broken = Unclosable()
    transport, unclosed = GuardedTransport(broken, lambda: None), UnclosedBlocks(allocator)
    allocation = allocator.alloc_blocks(3, ROOM)
    assert allocation is not None
    first, second, third = allocation.blocks
    allocator.quarantine((second,), ROOM)
    unclosed.close(transport, 1, (first, second))
    assert transport.may_still_write
    assert unclosed.keep((first, second, third), ROOM) == (third,)
    allocator.free((third,), ROOM)
    unclosed.free()
    assert (allocator.quarantined, allocator.available) == (2, 6)
    assert [block for block in range(8) if block in unclosed] == sorted((first, second))
    broken.is_broken = False
    transport.close_again()
    unclosed.free()
    assert allocator.available == 8
    assert first not in unclosed


def test_blocks_that_are_still_read_are_only_marked(allocator: ReqToMetadataBlockAllocator) -> None:
    broken = Unclosable()
    transport, unclosed = GuardedTransport(broken, lambda: None), UnclosedBlocks(allocator)
    allocation = allocator.alloc_blocks(1, ROOM)
    assert allocation is not None
    unclosed.close(transport, 1, allocation.blocks)
    broken.is_broken = False
    transport.close_again()
    unclosed.free()
    assert unclosed.keep(allocation.blocks, ROOM) == allocation.blocks


def test_a_transport_that_works_keeps_nothing(allocator: ReqToMetadataBlockAllocator) -> None:
    transport, unclosed = GuardedTransport(InMemoryTransport(), lambda: None), UnclosedBlocks(allocator)
    unclosed.close(transport, 1, (0,))
    assert unclosed.keep((0,), ROOM) == (0,)
    transport.close()
