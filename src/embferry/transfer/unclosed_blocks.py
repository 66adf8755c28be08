"""Blocks that a broken transport may still write to, although their transfer needs them no longer."""

from __future__ import annotations

from embferry.memory.blocks import ReqToMetadataBlockAllocator

from .guarded_transport import GuardedTransport


class UnclosedBlocks:
    """Keeps blocks in quarantine as long as a transport that has failed at this end cannot be closed.

    The peer's word alone does not suffice for these: its transport may have failed in the same way, in which case it
    has reported writes as ended that may still land. The manager's lock is held during every call.

    Args:
        allocator: The blocks.
    """

    def __init__(self, allocator: ReqToMetadataBlockAllocator) -> None:
        self._allocator = allocator
        self._writable: dict[int, GuardedTransport] = {}  # by block
        self._kept: dict[int, int] = {}  # block to the room that has released it

    def __contains__(self, block: int) -> bool:
        return block in self._kept

    def close(self, transport: GuardedTransport, epoch: int, blocks: tuple[int, ...]) -> None:
        """Closes blocks to their writer. Takes note of them if the transport may let it write all the same."""
        transport.close_blocks(epoch, blocks)
        if transport.may_still_write:
            self._writable.update(dict.fromkeys(blocks, transport))

    def keep(self, blocks: tuple[int, ...], room: int) -> tuple[int, ...]:
        """Quarantines those of the released blocks that may still be written. Returns the others."""
        kept = [block for block in blocks if block in self._writable]
        held = [block for block in kept if not self._allocator.is_quarantined(block)]
        self._allocator.quarantine(held, room)
        self._kept.update(dict.fromkeys(kept, room))
        return tuple(block for block in blocks if block not in self._writable)

    def free(self) -> None:
        """Frees the blocks of transports that have been closed by now."""
        if not self._writable:
            return
        for block in [block for block, transport in self._writable.items() if not transport.may_still_write]:
            del self._writable[block]
            if (room := self._kept.pop(block, None)) is not None:
                self._allocator.release_quarantined((block,), room)
