"""What a sender checks before it believes a receiver, and what it keeps of one."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import CapacityError, LayoutMismatch, RemoteProtocolError, TransportError
from .layout import Layout
from .messages import Grant, Open, Road, WriteFailed, Written, common_version

MAX_RECEIVERS = 64
MAX_GRANTS = 4096


@dataclass(slots=True)
class TakenGrant:
    """A grant being written: chunks leave from ``cursor`` on; what is reported is kept, to be repeated on demand."""

    message: Grant
    blocks: tuple[int, ...]
    cursor: int
    in_flight: int = 0
    reported: list[Written | WriteFailed] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.message.sent_tokens + self.message.allocated_tokens

    def blocks_of(self, start: int, stop: int, block_size: int) -> tuple[int, ...]:
        """The blocks that tokens ``[start, stop)`` go to."""
        first = (start - self.message.sent_tokens) // block_size
        return self.blocks[first : first + -(-(stop - start) // block_size)]


@dataclass(slots=True)
class Destination:
    """One receiver session that has opened the room."""

    session: int
    opened: Open
    version: int
    road: Road
    grants: dict[int, TakenGrant] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    draining: set[int] = field(default_factory=set)
    floor: int = 0
    acknowledged: int = 0

    @property
    def block_size(self) -> int:
        return self.opened.geometry.block_size


def accept(layout: Layout, roads: tuple[str, ...], source: int, body: Open, known: int) -> Destination:
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
    theirs = {road.transport: road for road in body.roads}
    shared = [name for name in roads if name in theirs]
    if not shared:
        names = f"{', '.join(roads)} at the encode side, {', '.join(theirs)} at the language side"
        raise TransportError(f"no transport in common: {names}; configure one that both have", retryable=False)
    return Destination(source, body, version, theirs[shared[0]])


def granted_blocks(grant: Grant, destination: Destination) -> tuple[int, ...]:
    """The blocks of a grant that a correct receiver could have made.

    :raises RemoteProtocolError: it could not.
    """
    num_blocks, block_size = destination.opened.geometry.num_blocks, destination.block_size
    if len(destination.grants) >= MAX_GRANTS:
        raise RemoteProtocolError(f"more than {MAX_GRANTS} grants at once")
    if sum(count for _, count in grant.runs) > num_blocks:  # before anything is allocated
        raise RemoteProtocolError(f"a grant of more blocks than the region's {num_blocks}")
    blocks = tuple(block for first, count in grant.runs for block in range(first, first + count))
    if max(blocks) >= num_blocks or len(set(blocks)) != len(blocks):
        raise RemoteProtocolError(f"a grant of blocks that do not exist or repeat, in a region of {num_blocks}")
    if not (len(blocks) - 1) * block_size < grant.allocated_tokens <= len(blocks) * block_size:
        raise RemoteProtocolError(f"a grant of {grant.allocated_tokens} tokens in {len(blocks)} blocks of {block_size}")
    return blocks
