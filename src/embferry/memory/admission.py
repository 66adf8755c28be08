"""Who gets the next free blocks: every waiting transfer in turn.

No transfer ever needs more than one block to go on, so nobody waits while holding, and a large embedding can neither
starve small ones nor be rejected for its size. Each turn hands out a fair share of what is free and sends the transfer
to the end of the rota.
"""

from __future__ import annotations

from embferry.protocol.messages import MAX_RUNS
from embferry.protocol.receiver import Receiver

from .blocks import MetadataAllocation, ReqToMetadataBlockAllocator, blocks_needed

PIPELINE = 4
"""An embedding that does not fit gets a pool in so many parts, so that one is written while another is used."""


MOST_AT_ONCE = 64
"""Where more than so many wait, a turn still gives this part of the pool: less would cost more than it brings."""


RESERVE = 16
"""The last part in so many of a pool is for those that hold nothing of it: so a little one finds room."""


class PoolAdmission:
    """One pool of blocks, shared by the receivers of one region. Pure: the time is an argument."""

    def __init__(self, allocator: ReqToMetadataBlockAllocator) -> None:
        self.allocator = allocator
        self._joined: set[int] = set()
        self._waiting: dict[int, Receiver] = {}  # by session, in the order of their turns
        self._next_epoch = 1

    def join(self, receiver: Receiver) -> None:
        """From now on it gets its turns."""
        self._joined.add(receiver.session)
        self._waiting[receiver.session] = receiver

    def leave(self, receiver: Receiver) -> None:
        """No more turns. What it was granted comes back by its own ``Release`` commands."""
        self._joined.discard(receiver.session)
        self._waiting.pop(receiver.session, None)

    def release(self, receiver: Receiver, blocks: tuple[int, ...]) -> None:
        """A receiver's ``Release`` command."""
        quarantined = tuple(block for block in blocks if self.allocator.is_quarantined(block))
        self.allocator.release_quarantined(quarantined, receiver.room)
        self.allocator.free(set(blocks).difference(quarantined), receiver.room)

    def note(self, receiver: Receiver, now: float) -> None:
        """Something has happened to a receiver: does it wait for blocks now?"""
        if receiver.session not in self._joined or receiver.wanted(now) is None:
            self._waiting.pop(receiver.session, None)
        else:
            self._waiting.setdefault(receiver.session, receiver)

    def note_quarantine(self, receiver: Receiver) -> None:
        """Tells the allocator of blocks that a receiver no longer counts on while their writer may still have access:
        it then shows them as quarantined, and refuses to have them freed like any other."""
        for grant in receiver.ledger:
            blocks = grant.open_blocks() if grant.draining else ()
            if blocks and not self.allocator.is_quarantined(blocks[0]):
                self.allocator.quarantine(blocks, receiver.room)

    def deal(self, now: float) -> list[tuple[Receiver, int]]:
        """Hands out what is free; answers who was granted something and so has commands, and under which epoch."""
        served: list[tuple[Receiver, int]] = []
        passed_over: dict[int, Receiver] = {}
        while self._waiting and self.allocator.available:
            receiver = self._waiting.pop(next(iter(self._waiting)))
            wanted = receiver.wanted(now)
            if wanted is None:
                continue
            free = self.allocator.available - (self.allocator.num_blocks // RESERVE if receiver.ledger.grants else 0)
            if free <= 0:
                passed_over[receiver.session] = receiver  # it comes again when what it has comes back
                continue
            count = self._share(blocks_needed(wanted[1], self.allocator.block_size), len(self._waiting) + 1, free)
            allocation = self.allocator.alloc_blocks(count, receiver.room)
            assert allocation is not None  # a share is never more than is free
            served.append((receiver, self._next_epoch))
            self.grant(receiver, allocation, now)
        self._waiting = passed_over | self._waiting  # they keep their turn
        return served

    def grant(self, receiver: Receiver, allocation: MetadataAllocation, now: float) -> int:
        """Grants an allocation, one of :meth:`deal`'s or the caller's own; answers the tokens granted."""
        tokens = receiver.grant(allocation.blocks, self._next_epoch, now)
        self._next_epoch += 1
        self._waiting.pop(receiver.session, None)
        self.note(receiver, now)  # if it wants more: at the end
        return tokens

    def _share(self, needed: int, waiting: int, free: int) -> int:
        """Blocks for one turn: all that is needed if everyone has room, else an equal share of what is free."""
        share = max(1, free // waiting, min(free, self.allocator.num_blocks // MOST_AT_ONCE))
        if needed > share:
            needed = min(share, max(1, self.allocator.num_blocks // PIPELINE))
        return min(needed, MAX_RUNS)
