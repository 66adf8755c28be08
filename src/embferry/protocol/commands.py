"""Commands of the state machines: data that a driver executes in the order given."""

from __future__ import annotations

from msgspec import Struct

from .messages import Body, TransportAddress


class Send(Struct, frozen=True, gc=False):
    """Send ``body`` to the peer's session ``target`` (0: the session that serves the room)."""

    body: Body
    target: int


# Commands of a receiver


class Admit(Struct, frozen=True, gc=False):
    """Let the peer write into ``blocks`` under ``epoch`` over ``transport``, where the peer is at ``address``.

    Precedes the grant message.
    """

    epoch: int
    blocks: tuple[int, ...]
    transport: str
    address: bytes


class CloseBlocks(Struct, frozen=True, gc=False):
    """Close ``blocks`` to their writer, which is done with them."""

    epoch: int
    blocks: tuple[int, ...]


class Revoke(Struct, frozen=True, gc=False):
    """Revoke the peer's access under ``epoch``; then call ``Receiver.revoked``."""

    epoch: int


class Verify(Struct, frozen=True, gc=False):
    """Compare ``checksum`` with the bytes of a chunk; then call ``Receiver.verified_chunk``.

    The chunk is tokens ``[offset, offset + length)``, which fill ``blocks`` from their start. A chunk without a
    checksum, which is possible only if the receiver asked for none, matches.
    """

    epoch: int
    offset: int
    length: int
    blocks: tuple[int, ...]
    checksum: bytes | None


class Deliver(Struct, frozen=True, gc=False):
    """Tokens ``[offset, offset + length)`` are verified and lie in ``blocks``.

    Call ``Receiver.consumed`` when the blocks are no longer read. The pair (offset, length) is the ``chunk_info``.
    """

    epoch: int
    offset: int
    length: int
    blocks: tuple[int, ...]


class Release(Struct, frozen=True, gc=False):
    """Return ``blocks`` to the pool: nothing writes to them or reads them any more."""

    blocks: tuple[int, ...]


class Restart(Struct, frozen=True, gc=False):
    """Forget what was delivered: the content of the room has changed before any of it was used."""


# Commands of a sender


class Write(Struct, frozen=True, gc=False):
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


class Connect(Struct, frozen=True, gc=False):
    """Connect to session ``target`` over ``transport`` before the first write.

    If that is impossible, call ``Sender.transport_failed``.
    """

    target: int
    transport: TransportAddress


class ReleaseSource(Struct, frozen=True, gc=False):
    """The embedding is no longer read: it may go to the cache or be freed."""


ReceiverCommand = Send | Admit | CloseBlocks | Revoke | Verify | Deliver | Release | Restart
SenderCommand = Send | Write | Connect | ReleaseSource
