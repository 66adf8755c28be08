"""What a machine wants done: data, executed by a driver in the order given."""

from __future__ import annotations

from dataclasses import dataclass

from .messages import Body, TransportAddress


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``body`` to the peer's session ``target`` (0: whoever serves the room)."""

    body: Body
    target: int


# Receiver's


@dataclass(frozen=True, slots=True)
class Admit:
    """Let the peer, whose end of ``transport`` is at ``address``, write into ``blocks`` under ``epoch`` over that transport.

    Comes before the grant goes out."""

    epoch: int
    blocks: tuple[int, ...]
    transport: str
    address: bytes


@dataclass(frozen=True, slots=True)
class CloseBlocks:
    """The writer is done with ``blocks``: close them to it."""

    epoch: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Revoke:
    """Take the peer's access under ``epoch`` away; answer with ``Receiver.revoked``."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Verify:
    """Compare ``checksum`` with the bytes of tokens ``[offset, offset + length)``, which fill ``blocks`` from their
    start; answer with ``Receiver.verified_chunk``. Without a checksum, which is only where none was asked for, they
    are taken as they are."""

    epoch: int
    offset: int
    length: int
    blocks: tuple[int, ...]
    checksum: bytes | None


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tokens ``[offset, offset + length)`` are verified and lie in ``blocks``; answer with ``Receiver.consumed`` when
    the blocks are no longer needed. The pair (offset, length) is the ``chunk_info``."""

    epoch: int
    offset: int
    length: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """``blocks`` go back to the pool: nobody writes to them, nobody reads them."""

    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Restart:
    """The content has changed under the same room before any of it was used: forget what was delivered."""


# Sender's


@dataclass(frozen=True, slots=True)
class Write:
    """Write tokens ``[offset, offset + length)`` into ``blocks``, from the first one's start, of the region that
    session ``target`` opened, over ``transport``; answer with ``Sender.write_done`` or ``Sender.write_failed``.

    ``checksum``: whether the receiver wants one."""

    target: int
    epoch: int
    offset: int
    length: int
    blocks: tuple[int, ...]
    transport: TransportAddress
    checksum: bool


@dataclass(frozen=True, slots=True)
class Connect:
    """Writes to session ``target`` will go over ``transport``: prepare for it; if that fails, ``Sender.transport_failed``."""

    target: int
    transport: TransportAddress


@dataclass(frozen=True, slots=True)
class ReleaseSource:
    """The embedding is no longer read from: it may go to the cache or be freed."""


ReceiverCommand = Send | Admit | CloseBlocks | Revoke | Verify | Deliver | Release | Restart
SenderCommand = Send | Write | Connect | ReleaseSource
