"""Control messages of the protocol: MessagePack arrays with a tag, every dimension bounded."""

from __future__ import annotations

from random import Random
from typing import Any

from embferry.protocol.errors import LayoutMismatch, RemoteProtocolError, VersionMismatch
from embferry.protocol.messages import Abort, Open, WriteFailed, decode, encode

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, as_msgpack

DTYPES = ("bfloat16", "float32", "int32", "uint8")


class ControlMessages(Target):
    documented = (RemoteProtocolError, VersionMismatch)
    nesting = (b"\x91", b"")
    inputs = 12_000

    def tree(self, chance: Random) -> Tree:
        return [1, chance.randrange(1 << 40), chance.randrange(1 << 40), a_body(chance)]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_msgpack(tree)]

    def run(self, pieces: Pieces) -> None:
        frame = decode(b"".join(pieces))
        assert decode(encode(frame)) == frame, "a frame changes when it is encoded again"
        match frame.body:
            case Open(geometry=geometry):
                try:
                    geometry.validate()
                except LayoutMismatch:
                    return
                assert geometry.region_bytes >= geometry.field_offsets[-1]
            case Abort() | WriteFailed():
                assert frame.body.error.code, "an error without a code"


def a_body(chance: Random) -> list[Any]:
    """Returns a valid body, as another implementation may write it."""
    return chance.choice(BODIES)(chance, chance.randrange(8))


def _open(chance: Random, room: int) -> list[Any]:
    fields = [[f"field {n}", chance.choice(DTYPES), chance.randrange(1, 5000)] for n in range(chance.randrange(1, 4))]
    transports = [[name, chance.randbytes(9)] for name in chance.sample(("tcp", "shm", "http", "nixl"), 2)]
    geometry = [[fields], chance.randrange(1, 512), chance.randrange(1, 512)]
    return ["open", room, chance.randrange(9), [1, 1], geometry, "tcp://10.0.0.1:9", transports, 7, True]


def _grant(chance: Random, room: int) -> list[Any]:
    runs = [[chance.randrange(1 << 20), chance.randrange(1, 64)] for _ in range(chance.randrange(1, 6))]
    return ["grant", room, chance.randrange(99), chance.randrange(999), chance.randrange(1, 999), runs, 0, "tcp"]


def _written(chance: Random, room: int) -> list[Any]:
    chunks = [[n * 64, 64, chance.choice((None, chance.randbytes(8)))] for n in range(chance.randrange(1, 6))]
    return ["written", room, chance.randrange(99), chunks]


def _offer(chance: Random, room: int) -> list[Any]:
    aux = [chance.randrange(-9, 9) for _ in range(chance.randrange(4))]
    return ["offer", room, 1, 1, "tcp", chance.randrange(-1, 1 << 40), chance.randbytes(16), aux, b"address"]


def _epochs(tag: str) -> Any:
    return lambda chance, room: [tag, room, [chance.randrange(99) for _ in range(chance.randrange(6))]]


def _failed(chance: Random, room: int) -> list[Any]:
    return ["write_failed", room, 3, chance.randrange(999), 8, "transport_error", "the link broke", True]


BODIES = (
    _open,
    _grant,
    _written,
    _offer,
    _failed,
    _epochs("drain"),
    _epochs("drained"),
    lambda chance, room: ["progress", room, chance.randrange(999), 2],
    lambda chance, room: ["confirm", room, chance.randrange(999)],
    lambda chance, room: ["pending", room, chance.randrange(99)],
    lambda chance, room: ["closed", room],
    lambda chance, room: ["unknown", room, chance.randrange(1 << 40)],
    lambda chance, room: ["abort", room, "aborted", "asked for", chance.randrange(9)],
)
