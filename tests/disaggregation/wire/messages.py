"""The origin's messages as its own code writes them, put together by hand, to compare the codec with."""

from __future__ import annotations

import struct

from embferry.disaggregation.wire.messages import Generation, OriginWire

WIRE = OriginWire(num_blocks=8, block_size=128)
V3_0 = OriginWire(num_blocks=8, block_size=128, generation=Generation.V3_0)

ROOM = 4611686018427387905
POINTERS = (0x7F0000000000, 0x7F0000100000, 0x7F0000200000, 0x7F0000300000)
SESSION = "10.0.0.2:15001"


def register(session: str = SESSION, pointers: tuple[int, ...] = POINTERS) -> list[bytes]:
    packed = struct.pack(f"{len(pointers)}Q", *pointers)
    return [b"None", b"10.0.0.2", b"41007", session.encode(), packed]


def init(
    room: int = ROOM, session: str = SESSION, blocks: bytes = b"3,0,5", ranks: int = 1, allocated: int = 384
) -> list[bytes]:
    head = [str(room).encode(), b"10.0.0.2", b"41007", session.encode()]
    return [*head, blocks, str(ranks).encode(), str(allocated).encode()]


def resume(
    sent: int = 384,
    room: int = ROOM,
    session: str = SESSION,
    blocks: bytes = b"1,2",
    ranks: int = 1,
    allocated: int = 256,
) -> list[bytes]:
    return [*init(room, session, blocks, ranks)[:6], str(sent).encode(), str(allocated).encode()]


def session_of(rank: int) -> str:
    return f"10.0.0.2:{15001 + rank}"
