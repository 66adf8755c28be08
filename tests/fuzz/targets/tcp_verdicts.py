"""The sending end of a ``tcp`` connection: verdicts and reports on progress, in arrivals of any size."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

from embferry.transports.contract import Written
from embferry.transports.outbox import Outbox
from embferry.transports.tcp import framing
from embferry.transports.tcp.framing import FrameError
from embferry.transports.tcp.send_link import SendLink

from ..doubles import ArrivingSocket, arrivals
from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Number, Tree, packed

TICKETS = range(1, 6)


class TcpVerdicts(Target):
    documented = (FrameError,)
    inputs = 3000
    bounds = Bounds(memory=256 << 10)

    def tree(self, chance: Random) -> Tree:
        frames, told = [], 0
        for ticket in chance.sample(TICKETS, chance.randrange(len(TICKETS) + 1)):
            if chance.random() < 0.5:
                told += chance.randrange(1, 1 << 40)
                frames.append(_frame(4, 0, told))
            frames.append(_frame(3, chance.choice((framing.WRITTEN, framing.REFUSED)), ticket))
        return frames

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        stream = b"".join(map(_encoded, tree))
        return arrivals(stream, [chance.randrange(len(stream) + 1) for _ in range(chance.randrange(4))])

    def run(self, pieces: Pieces) -> None:
        sock = ArrivingSocket(pieces)
        link = _link(sock)
        try:
            while sock.arrive():
                while sock.has_bytes:
                    link._receive_verdicts()
        finally:
            ended = [event.ticket for event in link._outbox.drain() if isinstance(event, Written)]
            assert len(set(ended)) == len(ended), "a write ends twice"
            assert not set(ended) & link._in_flight.keys(), "a write has ended, and is in flight"


def _frame(kind: int, verdict: int, value: int) -> list[Tree]:
    return [Number(kind, 1), Number(verdict, 2), Number(value, 8)]


def _encoded(frame: Tree) -> bytes:
    """Returns a frame; one whose parts are still there gets a right check, so that more than the check is tested."""
    match frame:
        case [Number(width=1) as kind, Number(width=2) as verdict, Number(width=8) as value]:
            return framing.answer(*(int.from_bytes(number.encoded()) for number in (kind, verdict, value)))
    return packed(frame)


def _link(sock: ArrivingSocket) -> SendLink:
    """Returns a link with writes in flight, as it is once it has connected."""
    link: Any = SendLink.__new__(SendLink)
    link._sock, link._received, link._acknowledged = sock, bytearray(), 0
    link._in_flight = dict.fromkeys(TICKETS)
    link._outbox = Outbox(lambda: None)
    link._stall_timeout_s, link._stall = 5.0, SimpleNamespace(set=lambda seconds: None, clear=lambda: None)
    return link  # type: ignore[no-any-return]
