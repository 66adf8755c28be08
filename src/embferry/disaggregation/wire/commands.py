"""What a sender's side of the origin's control plane wants done, and what it has to tell: data, in the order given."""

from __future__ import annotations

from dataclasses import dataclass

from embferry.protocol.states import KVPoll


@dataclass(frozen=True, slots=True)
class Registered:
    """A session's buffers are known now. What was cached about an earlier engine at this address is no longer true."""

    session: str
    pointers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Write tokens ``[sent_tokens, sent_tokens + num_tokens)`` of the room into ``blocks`` of a session, from the first
    one's start; answer with ``OriginRooms.written`` when no byte of it is on its way any more.

    :param pointers: base address of each buffer of that session; a block is a row of each.
    :param aux: ``aux_datas`` goes with the first block.
    """

    room: int
    session: str
    pointers: tuple[int, ...]
    blocks: tuple[int, ...]
    sent_tokens: int
    num_tokens: int
    aux: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Push ``[room, status]`` to the receiver at ``endpoint``, ``port``."""

    room: int
    endpoint: str
    port: int
    status: KVPoll


@dataclass(frozen=True, slots=True)
class Ended:
    """The room is over; nothing reads its embedding any more. ``reason`` is empty after a success."""

    room: int
    status: KVPoll
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A message was refused, and nothing else has happened. To be logged: the origin has no way to tell the peer."""

    reason: str
    room: int | None = None
    session: str | None = None


Command = Registered | WriteBlocks | Report | Ended | Refused
