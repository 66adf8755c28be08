"""What each end checks before it believes the other, and what a sender keeps of a receiver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from . import guards
from .errors import CapacityError, LayoutMismatch, RemoteProtocolError, TransportError
from .layout import Layout
from .messages import VERSIONS, Chunk, Grant, Offer, Open, TransportAddress, WriteFailed, common_version
from .transport_selector import TransportSelector

MAX_RECEIVERS = 64
MAX_OUTSTANDING = 1024
"""Grants that a receiver keeps outstanding for one transfer at most."""
MAX_GRANTS = 4 * MAX_OUTSTANDING
"""Grants, and refused epochs, that a sender keeps of one receiver. More are not answered until there is room."""


@dataclass(slots=True)
class TakenGrant:
    """A grant being written: chunks leave from ``cursor`` on; what is reported is kept, to be repeated on demand."""

    message: Grant
    cursor: int
    in_flight: dict[int, int] = field(default_factory=dict)  # chunks being written, by first token: their ordinals
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
        """Nothing more is started: the receiver takes its access back, and refuses what is under way."""
        self.cursor = self.stop
        self.cancelled = True

    def blocks_of(self, start: int, stop: int, block_size: int) -> tuple[int, ...]:
        """The blocks that tokens ``[start, stop)`` go to."""
        first = (start - self.message.sent_tokens) // block_size
        return tuple(self._blocks(first, first + -(-(stop - start) // block_size)))

    def _blocks(self, start: int, stop: int) -> Iterator[int]:
        """The ``start``-th to the ``stop``-th block; runs are never written out whole, their lengths are the peer's."""
        before = 0
        for first, count in self.message.runs:
            yield from range(first + max(start - before, 0), first + min(stop - before, count))
            before += count


@dataclass(slots=True)
class Destination:
    """One receiver session that has opened the room."""

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
        """The same session opens again. A higher opening says that it has taken back all that it granted.

        :raises RemoteProtocolError: it is not what it was.
        """
        if (body.geometry, body.transports) != (self.opened.geometry, self.opened.transports):
            raise RemoteProtocolError("an opening of the same session with other buffers or transports")
        if body.opening > self.opened.opening:
            self.acknowledged = 0  # of what another sender may have offered since
            for taken in self.grants.values():
                taken.cancel()
        self.opened = body

    def refuse(self, epoch: int) -> bool:
        """This epoch is never to be written, or not any further. False: too many are remembered already."""
        if epoch >= self.floor and epoch not in self.refused:
            if len(self.refused) >= MAX_GRANTS:
                return False
            self.refused.add(epoch)
        return True

    def forget_below(self, floor: int) -> None:
        """The receiver has closed these epochs: reports on them are not asked for any more."""
        if floor <= self.floor:
            return
        self.floor = floor
        for epoch in [epoch for epoch in self.grants if epoch < floor]:
            if self.grants[epoch].in_flight:
                self.grants[epoch].cancel()
            else:
                del self.grants[epoch]
        self.refused = {epoch for epoch in self.refused if epoch >= floor}


def accept(
    layout: Layout, transports: tuple[TransportAddress, ...], source: int, body: Open, known: int
) -> Destination:
    """A receiver that this end can serve.

    :raises VersionMismatch: no protocol version in common.
    :raises LayoutMismatch: the fields differ; the detail says how.
    :raises TransportError: no transport in common.
    :raises CapacityError: too many receivers have opened the room.
    """
    if known >= MAX_RECEIVERS:
        raise CapacityError(f"{known} receivers have opened this room already; use another room")
    version = common_version(body.versions)
    body.geometry.validate()
    difference = layout.difference(body.geometry.layout)
    if difference is not None:
        raise LayoutMismatch(f"the encode side's embedding and the language side's buffers differ: {difference}")
    ours, theirs = ({transport.name: transport for transport in ends} for ends in (transports, body.transports))
    shared = [theirs[name] for name in ours if name in theirs]
    if not shared:
        names = f"{', '.join(ours)} at the encode side, {', '.join(theirs)} at the language side"
        raise TransportError(f"no transport in common: {names}; configure one that both have", retryable=False)
    return Destination(source, body, version, TransportSelector(shared))


def check_grant(grant: Grant, destination: Destination) -> None:
    """Raises :class:`RemoteProtocolError` for a grant that no correct receiver could have made."""
    num_blocks, block_size = destination.opened.geometry.num_blocks, destination.block_size
    if grant.transport not in destination.transports.names:
        raise RemoteProtocolError(f"a grant over {grant.transport!r}, which is no transport of both ends")
    at = 0
    for first, count in sorted(grant.runs):
        if first < at or first + count > num_blocks:
            raise RemoteProtocolError(f"a grant of blocks that repeat or do not exist, in a region of {num_blocks}")
        at = first + count
    blocks = sum(count for _, count in grant.runs)
    if not (blocks - 1) * block_size < grant.allocated_tokens <= blocks * block_size:
        raise RemoteProtocolError(f"a grant of {grant.allocated_tokens} tokens in {blocks} blocks of {block_size}")


def check_offer(offer: Offer, transports: tuple[TransportAddress, ...]) -> None:
    """Raises :class:`RemoteProtocolError` for an offer that no correct sender could have made to this opening."""
    if offer.transport not in {transport.name for transport in transports}:
        raise RemoteProtocolError(f"the encode side chose the transport {offer.transport!r}, which was not among ours")
    if not VERSIONS[0] <= offer.version <= VERSIONS[1]:
        raise RemoteProtocolError(f"the encode side chose version {offer.version}, which was not among ours")
    if offer.total_tokens >= 0 and not offer.content_digest:
        raise RemoteProtocolError("the encode side announced a length without a content digest")


def check_chunk(chunk: Chunk, *, verify: bool) -> None:
    """Raises :class:`RemoteProtocolError` for a chunk without the checksum that was asked for."""
    if not guards.has_checksum(chunk.checksum, verify):
        raise RemoteProtocolError(f"the chunk at token {chunk.offset} came without the checksum that was asked for")


def goes_on(offer: Offer, total_tokens: int, content_digest: bytes | None) -> bool:
    """Whether what is offered is what is here already, in part."""
    return total_tokens in (-1, offer.total_tokens) and guards.same_content(content_digest, offer.content_digest)
