"""A sender's memory of one receiver: its grants, and the reports on each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import RemoteProtocolError
from .messages import Chunk, Grant, Open, WriteFailed
from .transport_selector import TransportSelector
from .validation import MAX_GRANTS


@dataclass(slots=True)
class TakenGrant:
    """A grant that the sender has accepted.

    Attributes:
        message: The grant as received.
        cursor: The next token to write.
        in_flight: Chunks being written: first token to ordinal of the write.
        written: Reported chunks, kept to be repeated on request.
        failed: Reported failures, kept likewise.
        cancelled: Whether no further write of it will be started.
    """

    message: Grant
    cursor: int
    in_flight: dict[int, int] = field(default_factory=dict)
    written: list[Chunk] = field(default_factory=list)
    failed: list[WriteFailed] = field(default_factory=list)
    cancelled: bool = False

    @property
    def stop(self) -> int:
        return self.message.sent_tokens + self.message.allocated_tokens

    @property
    def reported(self) -> bool:
        return bool(self.written or self.failed)

    def cancel(self) -> None:
        """Starts no further write: the receiver revokes this grant, and rejects writes that are in flight."""
        self.cursor = self.stop
        self.cancelled = True

    def blocks_of(self, start: int, stop: int, block_size: int) -> tuple[int, ...]:
        """Returns the blocks that tokens ``[start, stop)`` go to."""
        first = (start - self.message.sent_tokens) // block_size
        return tuple(self._blocks(first, first + -(-(stop - start) // block_size)))

    def _blocks(self, start: int, stop: int) -> Iterator[int]:
        """Yields blocks ``[start, stop)`` of the grant.

        The lengths of runs come from the peer, so no run is ever expanded as a whole.
        """
        before = 0
        for first, count in self.message.runs:
            yield from range(first + max(start - before, 0), first + min(stop - before, count))
            before += count


@dataclass(slots=True)
class Destination:
    """One receiver session that has opened the room.

    Attributes:
        session: The receiver's session.
        opened: Its latest ``open`` message.
        version: The protocol version in use with it.
        transports: The transports shared with it.
        grants: Accepted grants by epoch.
        refused: Epochs that were drained: never written, or not any further.
        draining: Epochs to report as drained when their writes in flight have ended.
        floor: Every epoch below it is closed.
        acknowledged: Tokens that the receiver has verified.
    """

    session: int
    opened: Open
    version: int
    transports: TransportSelector
    grants: dict[int, TakenGrant] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    draining: set[int] = field(default_factory=set)
    floor: int = 0
    acknowledged: int = 0

    @property
    def block_size(self) -> int:
        return self.opened.geometry.block_size

    def reopen(self, body: Open) -> None:
        """Handles another ``open`` of the same session. A higher generation means that it has revoked all its grants.

        Raises:
            RemoteProtocolError: Its buffers or transports have changed.
        """
        if (body.geometry, body.transports) != (self.opened.geometry, self.opened.transports):
            raise RemoteProtocolError("a session opened the room again with other buffers or transports")
        if body.generation > self.opened.generation:
            self.acknowledged = 0  # it may concern what another sender has offered since
            for taken in self.grants.values():
                taken.cancel()
        self.opened = body

    def refuse(self, epoch: int) -> bool:
        """Marks an epoch as never to be written any further. Returns False if too many are remembered already."""
        if epoch >= self.floor and epoch not in self.refused:
            if len(self.refused) >= MAX_GRANTS:
                return False
            self.refused.add(epoch)
        return True

    def forget_below(self, floor: int) -> None:
        """The receiver has closed every epoch below ``floor``: it will not ask for reports on them."""
        if floor <= self.floor:
            return
        self.floor = floor
        for epoch in [epoch for epoch in self.grants if epoch < floor]:
            if self.grants[epoch].in_flight:
                self.grants[epoch].cancel()
            else:
                del self.grants[epoch]
        self.refused = {epoch for epoch in self.refused if epoch >= floor}
