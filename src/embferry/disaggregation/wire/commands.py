"""Effects of a sender's rules, to be executed in the order given. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from embferry.protocol.states import KVPoll


@dataclass(frozen=True, slots=True)
class Registered:
    """The buffers of a session are known now. What was cached about an earlier engine at its address is obsolete."""

    session: str
    pointers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Write tokens ``[sent_tokens, sent_tokens + num_tokens)`` of the room into ``blocks`` of a session.

    Call ``SenderRooms.written`` when no byte of the write is in flight any more.

    Attributes:
        pointers: Base address of each buffer of that session; a block is a row of each.
        aux: Whether ``aux_datas`` is written with the first block.
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
    """Push ``[room, status]`` to the receiver at ``endpoint`` and ``port``."""

    room: int
    endpoint: str
    port: int
    status: KVPoll


@dataclass(frozen=True, slots=True)
class Ended:
    """The room is over, and its embedding is not read any more. ``reason`` is empty after a success."""

    room: int
    status: KVPoll
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A message was refused and had no other effect. Log it, because the origin has no message to tell the peer."""

    reason: str
    room: int | None = None
    session: str | None = None


Command = Registered | WriteBlocks | Report | Ended | Refused
