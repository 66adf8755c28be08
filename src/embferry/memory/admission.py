"""Admission to the pool: every waiting transfer is granted blocks in turn.

A transfer needs only one block to progress. It therefore never waits for blocks while it holds others, and a large
embedding neither starves small ones nor is rejected for its size. Each turn grants a fair share of the free blocks and
moves the transfer to the end of the queue.
"""

from __future__ import annotations

from collections.abc import Callable

from embferry.protocol.messages import MAX_RUNS
from embferry.protocol.receiver import Receiver

from .blocks import MetadataAllocation, ReqToMetadataBlockAllocator, blocks_needed

PIPELINE = 4
"""An embedding larger than its share is granted at most 1/4 of the pool, so that writing and use overlap."""

MOST_AT_ONCE = 64
"""A turn grants at least 1/64 of the pool, however many transfers wait: smaller grants cost more than they gain."""

RESERVE = 16
"""1/16 of the pool is reserved for transfers that hold no blocks, so that small ones always progress."""


Failed = Callable[[Receiver, Exception], None]


class PoolAdmission:
    """Shares one pool of blocks among the receivers of a region. Pure: the time is an argument."""

    def __init__(self, allocator: ReqToMetadataBlockAllocator) -> None:
        self.allocator = allocator
        self._registered: set[int] = set()
        self._waiting: dict[int, Receiver] = {}  # by session, in the order of their turns
        self._next_epoch = 1

    def register(self, receiver: Receiver) -> None:
        """The receiver is granted blocks in turn from now on."""
        self._registered.add(receiver.session)
        self._waiting[receiver.session] = receiver

    def unregister(self, receiver: Receiver) -> None:
        """The receiver is granted nothing more. Its blocks return through its ``Release`` commands."""
        self._registered.discard(receiver.session)
        self._waiting.pop(receiver.session, None)

    def release(self, receiver: Receiver, blocks: tuple[int, ...]) -> None:
        """Executes a receiver's ``Release`` command."""
        quarantined = tuple(block for block in blocks if self.allocator.is_quarantined(block))
        self.allocator.release_quarantined(quarantined, receiver.room)
        self.allocator.free(set(blocks).difference(quarantined), receiver.room)

    def update(self, receiver: Receiver, now: float) -> None:
        """Queues the receiver if it waits for blocks now: if it wants any. Call it after every event of a receiver."""
        if receiver.session in self._registered and receiver.wanted(now) is not None:
            self._waiting.setdefault(receiver.session, receiver)
        else:
            self._waiting.pop(receiver.session, None)

    def update_quarantine(self, receiver: Receiver) -> None:
        """Quarantines the blocks of draining grants, whose writer may still have access."""
        for grant in receiver.ledger.grants.values():
            blocks = grant.open_blocks() if grant.draining else ()
            if blocks and not self.allocator.is_quarantined(blocks[0]):
                self.allocator.quarantine(blocks, receiver.room)

    def allocate(self, now: float, failed: Failed | None = None) -> list[tuple[Receiver, int]]:
        """Grants the free blocks.

        Args:
            now: Seconds.
            failed: Called with a receiver that has raised, which is unregistered, and with the exception. None: it is
                raised.

        Returns:
            (receiver, epoch) for every grant; these receivers have commands now.
        """
        served: list[tuple[Receiver, int]] = []
        passed_over: dict[int, Receiver] = {}
        while self._waiting and self.allocator.available:
            receiver = self._waiting.pop(next(iter(self._waiting)))
            try:
                epoch = self._serve(receiver, now, passed_over)
            except Exception as error:
                self.unregister(receiver)
                if failed is None:
                    raise
                failed(receiver, error)
                continue
            if epoch:
                served.append((receiver, epoch))
        self._waiting = passed_over | self._waiting  # they keep their place in the queue
        return served

    def _serve(self, receiver: Receiver, now: float, passed_over: dict[int, Receiver]) -> int:
        """Grants blocks to one receiver. Returns the epoch, or 0."""
        wanted = receiver.wanted(now)
        if wanted is None:
            return 0
        free = self.allocator.available - (self.allocator.num_blocks // RESERVE if receiver.ledger.grants else 0)
        if free <= 0:
            passed_over[receiver.session] = receiver  # it is served when its own blocks return
            return 0
        count = self._share(blocks_needed(wanted[1], self.allocator.block_size), len(self._waiting) + 1, free)
        allocation = self.allocator.alloc_blocks(count, receiver.room)
        assert allocation is not None  # a share is never more than is free
        epoch = self._next_epoch
        try:
            self.grant(receiver, allocation, now)
        except Exception:
            if epoch not in receiver.ledger.grants:
                self.allocator.free(allocation.blocks, receiver.room)
            raise
        return epoch

    def grant(self, receiver: Receiver, allocation: MetadataAllocation, now: float) -> int:
        """Grants an allocation made by :meth:`allocate` or by the caller. Returns the number of tokens granted."""
        tokens = receiver.grant(allocation.blocks, self._next_epoch, now)
        self._next_epoch += 1
        self._waiting.pop(receiver.session, None)
        self.update(receiver, now)  # if it wants more, it goes to the end of the queue
        return tokens

    def _share(self, needed: int, waiting: int, free: int) -> int:
        """Returns the blocks for one turn: all that are needed if they fit a fair share, otherwise an equal share."""
        share = max(1, free // waiting, min(free, self.allocator.num_blocks // MOST_AT_ONCE))
        if needed > share:
            needed = min(share, max(1, self.allocator.num_blocks // PIPELINE))
        return min(needed, MAX_RUNS)
