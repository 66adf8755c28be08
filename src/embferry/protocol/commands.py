"""Commands of the state machines: data that a driver executes in the order given."""

from __future__ import annotations

from dataclasses import dataclass

from .messages import Body, TransportAddress


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``body`` to the peer's session ``target`` (0: the session that serves the room)."""

    body: Body
    target: int


# Commands of a receiver


@dataclass(frozen=True, slots=True)
class Admit:
    """Let the peer write into ``blocks`` under ``epoch`` over ``transport``, where the peer is at ``address``.

    Precedes the grant message.
    """

    epoch: int
    blocks: tuple[int, ...]
    transport: str
    address: bytes


@dataclass(frozen=True, slots=True)
class CloseBlocks:
    """Close ``blocks`` to their writer, which is done with them."""

    epoch: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Revoke:
    """Revoke the peer's access under ``epoch``; then call ``Receiver.revoked``."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Verify:
    """Compare ``checksum`` with the bytes of a chunk; then call ``Receiver.verified_chunk``.

    The chunk is tokens ``[offset, offset + length)``, which fill ``blocks`` from their start. A chunk without a
    checksum, which is possible only if the receiver asked for none, matches.
    """

    epoch: int
    offset: int
    length: int
    blocks: tuple[int, ...]
    checksum: bytes | None


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tokens ``[offset, offset + length)`` are verified and lie in ``blocks``.

    Call ``Receiver.consumed`` when the blocks are no longer read. The pair (offset, length) is the ``chunk_info``.
    """

    epoch: int
    offset: int
    length: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Return ``blocks`` to the pool: nothing writes to them or reads them any more."""

    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Restart:
    """Forget what was delivered: the content of the room has changed before any of it was used."""


# Commands of a sender


@dataclass(frozen=True, slots=True)
class Write:
    """Write a chunk over ``transport``; then call ``Sender.write_done`` or ``Sender.write_failed``.

    Tokens ``[offset, offset + length)`` go into ``blocks`` of the region of session ``target``, from the first block's
    start on.

    ``checksum`` says whether the receiver wants one.
    """

    target: int
    epoch: int
    offset: int
    length: int
    blocks: tuple[int, ...]
    transport: TransportAddress
    checksum: bool


@dataclass(frozen=True, slots=True)
class Connect:
    """Connect to session ``target`` over ``transport`` before the first write.

    If that is impossible, call ``Sender.transport_failed``.
    """

    target: int
    transport: TransportAddress


@dataclass(frozen=True, slots=True)
class ReleaseSource:
    """The embedding is no longer read: it may go to the cache or be freed."""


ReceiverCommand = Send | Admit | CloseBlocks | Revoke | Verify | Deliver | Release | Restart
SenderCommand = Send | Write | Connect | ReleaseSource
