"""The side channel of ``nixl`` and ``mooncake``: messages behind a length, in arrivals of any size."""

from __future__ import annotations

from random import Random

from embferry.transports.leased.channel import Channel
from embferry.transports.leased.messages import Ask, FrameError, Message, decode, encode, framed, unpack_ranges
from embferry.transports.net.loop import READ

from ..doubles import ArrivingSocket, StillLoop, arrivals
from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_msgpack

LIMIT = 1 << 13


class Leased(Target):
    documented = (FrameError,)
    nesting = (b"\x91", b"")
    inputs = 6000
    bounds = Bounds(memory=256 << 10)

    def tree(self, chance: Random) -> Tree:
        messages = [_message(chance) for _ in range(chance.randrange(1, 5))]
        return [as_msgpack(message) if chance.random() < 0.3 else message for message in messages]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        stream = b"".join(
            framed(part if isinstance(part, bytes) else as_msgpack(part), number) for number, part in enumerate(tree)
        )
        return arrivals(stream, [chance.randrange(len(stream) + 1) for _ in range(chance.randrange(3))])

    def run(self, pieces: Pieces) -> None:
        apart, fault = _received(pieces)
        whole, fault_of_whole = _received([b"".join(pieces)])
        assert (apart, fault) == (whole, fault_of_whole), "the messages depend on how the bytes arrive"
        for message in apart:
            assert decode(encode(message)) == message, "a message changes when it is encoded again"
        if fault:
            assert "this end failed" not in fault, fault
            raise FrameError(fault)


def _received(pieces: Pieces) -> tuple[list[Message], str]:
    """Reads a connection. Returns the messages, and the fault that ended it."""
    found: list[Message] = []
    faults: list[str] = []

    def take(message: Message) -> None:
        if isinstance(message, Ask):
            unpack_ranges(message.ranges)
        found.append(message)

    sock = ArrivingSocket(pieces)
    channel = Channel(
        sock,  # type: ignore[arg-type]
        StillLoop(),  # type: ignore[arg-type]
        on_message=take,
        on_fault=lambda error: faults.append(str(error)),
        on_end=lambda reason: None,
        limit=LIMIT,
        max_unsent=1 << 16,
    )
    while sock.arrive():
        while sock.has_bytes:
            channel._ready(READ)
    return found, "".join(faults)


def _message(chance: Random) -> list[Tree]:
    serial = chance.randrange(1 << 40)
    ranges = chance.randbytes(16 * chance.randrange(1, 9))
    return chance.choice(
        (
            ["hello", chance.randbytes(16), "boot"],
            ["welcome", chance.randbytes(chance.randrange(99)), chance.randrange(1 << 48)],
            ["ask", serial, chance.randrange(99), ranges],
            ["verdict", serial, chance.random() < 0.5],
            ["stop", serial],
            ["done", serial],
            ["failed", serial],
            ["acknowledged", serial, True],
            ["ping"],
            ["pong"],
            ["broken"],
        )
    )
