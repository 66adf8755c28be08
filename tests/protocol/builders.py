"""One machine, played by hand: what it is told, and what it says."""

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

ROOM, LANGUAGE, ENCODE = 7, 100, 200  # the room, and the sessions of its two ends
SIZE = 4  # tokens a block
CHECKSUM = b"checksum"
GEOMETRY = Geometry(LAYOUT, 16, SIZE)
TRANSPORTS = (TransportAddress("tcp", b"tcp handle"), TransportAddress("shm", b"shm handle"))
AT_ONCE = {"chunk_bytes": SIZE * TOKEN_BYTES, "progress_rate": math.inf}
SETTINGS = TransferSettings(**AT_ONCE, default_allocate_tokens=6)


def new_receiver(**settings: Any) -> Receiver:
    given = TransferSettings(**{**AT_ONCE, "default_allocate_tokens": 6, **settings})
    return Receiver(ROOM, LANGUAGE, GEOMETRY, "language", TRANSPORTS, given, 0.0)


def new_sender(*, total: int = -1, ready: int = 0, **settings: Any) -> Sender:
    given = TransferSettings(**{**AT_ONCE, **settings})
    sender = Sender(ROOM, ENCODE, LAYOUT, (TransportAddress("shm", b""), TransportAddress("tcp", b"")), given, 0.0)
    if total >= 0:
        sender.announce(total, b"content")
        sender.produce(ready)
    return sender


def said(machine: Receiver | Sender) -> list[Body]:
    """The messages among the commands since the last look; the other commands are dropped."""
    return [command.body for command in machine.take_commands() if isinstance(command, Send)]


def done(machine: Receiver | Sender) -> list[Any]:
    """The commands since the last look, without the messages."""
    return [command for command in machine.take_commands() if not isinstance(command, Send)]


def hear(receiver: Receiver, body: Body, now: float = 0.0, source: int = ENCODE) -> None:
    receiver.receive(source, LANGUAGE, body, now)


def tell(sender: Sender, body: Body, now: float = 0.0, source: int = LANGUAGE, target: int = ENCODE) -> None:
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
    """A receiver that has been told what there is."""
    receiver = new_receiver(**settings)
    hear(receiver, an_offer(total))
    receiver.take_commands()
    return receiver


def opened(total: int, ready: int | None = None, **settings: Any) -> Sender:
    """A sender that has been asked for what it has."""
    sender = new_sender(total=total, ready=total if ready is None else ready, **settings)
    tell(sender, an_open(), target=0)
    sender.take_commands()
    return sender


def written(epoch: int, offset: int, length: int) -> Written:
    return Written(ROOM, epoch, (Chunk(offset, length, CHECKSUM),))


def bring(receiver: Receiver, epoch: int, offset: int, length: int, *, matches: bool = True) -> None:
    """A chunk is reported and its bytes are looked at."""
    hear(receiver, written(epoch, offset, length))
    receiver.verified_chunk(epoch, offset, matches=matches, now=0.0)
