"""Checks of what the peer says: whether a correct peer could have said it, and whether it is within bounds."""

from __future__ import annotations

from . import guards
from .errors import CapacityError, LayoutMismatch, RemoteProtocolError, TransportError
from .layout import Geometry, Layout
from .messages import VERSIONS, Chunk, Grant, Offer, Open, TransportAddress, common_version
from .runs import Runs, distinct_runs
from .transport_selector import TransportSelector

MAX_RECEIVERS = 64
"""Receiver sessions that one room serves in its lifetime."""
MAX_OUTSTANDING = 1024
"""Grants that a receiver keeps outstanding for one transfer."""
MAX_OPEN_RUNS = 1 << 18
"""Runs of blocks in the open grants of one receiver. It asks for no more, and a sender takes up no more."""
MAX_GRANTS = 4 * MAX_OUTSTANDING
"""Grants, and refused epochs, that a sender remembers of one receiver. Further ones stay unanswered meanwhile."""

MAX_REPORTS = 1 << 18
"""Reports of writes that a sender keeps for one receiver. A correct one closes grants long before."""


def check_open(
    layout: Layout, transports: tuple[TransportAddress, ...], body: Open, known: int
) -> tuple[int, TransportSelector]:
    """Checks that this sender can serve a receiver.

    Args:
        layout: Of the embedding.
        transports: The sender's transports, the preferred one first.
        body: The receiver's ``open``.
        known: Receivers that have opened the room so far.

    Returns:
        The protocol version and the shared transports to use.

    Raises:
        VersionMismatch: There is no common protocol version.
        LayoutMismatch: The fields differ; the detail says how.
        TransportError: There is no common transport.
        CapacityError: Too many receivers have opened the room.
    """
    if known >= MAX_RECEIVERS:
        raise CapacityError(f"{known} receivers have opened this room already; use another room")
    version = common_version(body.versions)
    body.geometry.validate()
    difference = layout.difference(body.geometry.layout)
    if difference is not None:
        raise LayoutMismatch(f"the encode side's embedding and the language side's buffers differ: {difference}")
    ours, theirs = ({address.name: address for address in end} for end in (transports, body.transports))
    shared = [theirs[name] for name in ours if name in theirs]
    if not shared:
        names = f"{', '.join(ours)} at the encode side, {', '.join(theirs)} at the language side"
        raise TransportError(f"no transport in common: {names}; configure one that both have", retryable=False)
    return version, TransportSelector(shared)


def check_grant(grant: Grant, geometry: Geometry, transports: set[str]) -> Runs:
    """Checks a grant against the receiver's region and the shared transports. Returns its blocks.

    Raises:
        RemoteProtocolError: No correct receiver could have made it.
    """
    if grant.transport not in transports:
        raise RemoteProtocolError(f"a grant over {grant.transport!r}, which the two ends do not share")
    runs = distinct_runs(grant.runs, geometry.num_blocks)
    if runs is None:
        raise RemoteProtocolError(f"a grant of blocks that repeat or are outside of a region of {geometry.num_blocks}")
    size = geometry.block_size
    if not (runs.blocks - 1) * size < grant.allocated_tokens <= runs.blocks * size:
        raise RemoteProtocolError(f"a grant of {grant.allocated_tokens} tokens in {runs.blocks} blocks of {size}")
    return runs


def check_offer(
    offer: Offer,
    transports: tuple[TransportAddress, ...],
    token_bytes: int,
    max_embedding_bytes: int,
    max_tokens: int | None,
) -> None:
    """Checks an offer against what the receiver has opened with, and against what it can take.

    Args:
        offer: The offer.
        transports: The transports that ``open`` named.
        token_bytes: Bytes of a token.
        max_embedding_bytes: The setting.
        max_tokens: Tokens that the receiver's caller has room for; None: any number.

    Raises:
        RemoteProtocolError: No correct sender could have made it.
        CapacityError: The embedding is too long for this receiver.
    """
    if offer.transport not in {address.name for address in transports}:
        raise RemoteProtocolError(f"the encode side chose the transport {offer.transport!r}, which was not among ours")
    if not VERSIONS[0] <= offer.version <= VERSIONS[1]:
        raise RemoteProtocolError(f"the encode side chose version {offer.version}, which was not among ours")
    if offer.total_tokens >= 0 and not offer.content_digest:
        raise RemoteProtocolError("the encode side announced a length without a content digest")
    size = offer.total_tokens * token_bytes
    if size > max_embedding_bytes:
        why = f"an embedding of {offer.total_tokens} tokens has {size} bytes; the limit is {max_embedding_bytes}"
        raise CapacityError(f"{why}: send a smaller one, or raise max_embedding_bytes", retryable=False)
    if max_tokens is not None and offer.total_tokens > max_tokens:
        why = f"an embedding of {offer.total_tokens} tokens was offered, and there is room for {max_tokens}"
        raise CapacityError(f"{why} (max_tokens): both sides must count the same tokens", retryable=False)


def check_chunk(chunk: Chunk, *, verify: bool) -> None:
    """Checks that a reported chunk has the checksum that was requested.

    Raises:
        RemoteProtocolError: It has none.
    """
    if not guards.has_checksum(chunk.checksum, verify):
        raise RemoteProtocolError(f"the chunk at token {chunk.offset} came without the checksum that was requested")


def continues(offer: Offer, total_tokens: int, content_digest: bytes | None) -> bool:
    """Returns whether an offer has the same content as what has arrived so far."""
    return total_tokens in (-1, offer.total_tokens) and guards.same_content(content_digest, offer.content_digest)
