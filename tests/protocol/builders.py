"""Builders of one state machine and of the messages a test sends to it."""

from __future__ import annotations

import math
from typing import Any

from embferry.protocol.commands import Send
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import Body, Chunk, Grant, Offer, Open, TransportAddress, Written
from embferry.protocol.receiver import Receiver
from embferry.protocol.sender import Sender
from embferry.protocol.settings import TransferSettings

from .ends import LAYOUT, TOKEN_BYTES

ROOM, LANGUAGE, ENCODE = 7, 100, 200  # the room, the receiver's session, the sender's session
SIZE = 4  # tokens a block
CHECKSUM = b"checksum"
GEOMETRY = Geometry(LAYOUT, 16, SIZE)
TRANSPORTS = (TransportAddress("tcp", b"tcp handle"), TransportAddress("shm", b"shm handle"))
AT_ONCE = {"chunk_bytes": SIZE * TOKEN_BYTES, "progress_rate": math.inf}
SETTINGS = TransferSettings(**AT_ONCE, default_allocate_tokens=6)


def new_receiver(*, max_tokens: int | None = None, offer_timeout: float | None = None, **settings: Any) -> Receiver:
    given = TransferSettings(**{**AT_ONCE, "default_allocate_tokens": 6, **settings})
    limits = {"max_tokens": max_tokens, "offer_timeout": offer_timeout}
    return Receiver(ROOM, LANGUAGE, GEOMETRY, "language", TRANSPORTS, given, 0.0, **limits)


def new_sender(*, total: int = -1, ready: int = 0, **settings: Any) -> Sender:
    given = TransferSettings(**{**AT_ONCE, **settings})
    sender = Sender(ROOM, ENCODE, LAYOUT, (TransportAddress("shm", b""), TransportAddress("tcp", b"")), given, 0.0)
    if total >= 0:
        sender.announce(total, b"content")
        sender.produce(ready)
    return sender


def sent_messages(machine: Receiver | Sender) -> list[Body]:
    """Takes the machine's commands and returns the messages among them; the others are discarded."""
    return [command.body for command in machine.take_commands() if isinstance(command, Send)]


def other_commands(machine: Receiver | Sender) -> list[Any]:
    """Takes the machine's commands and returns those that are not messages; the messages are discarded."""
    return [command for command in machine.take_commands() if not isinstance(command, Send)]


def to_receiver(receiver: Receiver, body: Body, now: float = 0.0, source: int = ENCODE) -> None:
    receiver.receive(source, LANGUAGE, body, now)


def to_sender(sender: Sender, body: Body, now: float = 0.0, source: int = LANGUAGE, target: int = ENCODE) -> None:
    sender.receive(source, target, body, now)


def an_open(generation: int = 1, **changes: Any) -> Open:
    fields = {"versions": (1, 1), "geometry": GEOMETRY, "transports": TRANSPORTS, "transferred_tokens": 0, **changes}
    return Open(ROOM, generation, fields["versions"], fields["geometry"], "language", fields["transports"], 0)


def an_offer(
    total: int, generation: int = 1, digest: bytes = b"content", transport: str = "tcp", version: int = 1
) -> Offer:
    return Offer(ROOM, generation, version, transport, total, digest if total >= 0 else b"", (total, 3))


def a_grant(
    epoch: int, start: int, tokens: int, *runs: tuple[int, int], floor: int = 0, transport: str = "shm"
) -> Grant:
    return Grant(ROOM, epoch, start, tokens, runs, floor, transport)


def offered(total: int, **settings: Any) -> Receiver:
    """Returns a receiver that has been offered an embedding of ``total`` tokens."""
    receiver = new_receiver(**settings)
    to_receiver(receiver, an_offer(total))
    receiver.take_commands()
    return receiver


def opened(total: int, ready: int | None = None, **settings: Any) -> Sender:
    """Returns a sender that announced ``total`` tokens and was opened by a receiver."""
    sender = new_sender(total=total, ready=total if ready is None else ready, **settings)
    to_sender(sender, an_open(), target=0)
    sender.take_commands()
    return sender


def written(epoch: int, offset: int, length: int) -> Written:
    return Written(ROOM, epoch, (Chunk(offset, length, CHECKSUM),))


def report_chunk(receiver: Receiver, epoch: int, offset: int, length: int, *, matches: bool = True) -> None:
    """Reports a chunk as written and its verification as finished."""
    to_receiver(receiver, written(epoch, offset, length))
    receiver.verified_chunk(epoch, offset, matches=matches, now=0.0)
