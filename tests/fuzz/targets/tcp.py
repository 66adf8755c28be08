"""The receiving end of a ``tcp`` connection: only the blocks of open windows change, for all bytes that can arrive."""

from __future__ import annotations

import logging
import struct
from random import Random
from types import SimpleNamespace
from typing import Any

from embferry.transports.contract import Window
from embferry.transports.net.loop import READ
from embferry.transports.outbox import Outbox
from embferry.transports.receive_region import ReceiveRegion
from embferry.transports.tcp import framing
from embferry.transports.tcp.framing import FrameError
from embferry.transports.tcp.receive_server import SenderConnection

from ..doubles import ArrivingSocket, StillLoop, arrivals
from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Number, Tree, packed

TOKEN = b"0123456789abcdef"
ROWS = ((0, 24), (192, 8))
"""Two fields of eight blocks."""
NUM_BLOCKS = 8
WINDOWS = {5: (1, 2, 3), 9: (6,)}
UNTOUCHED = 0xEE


class Tcp(Target):
    documented = (FrameError,)
    inputs = 8000
    bounds = Bounds(memory=2 << 20)

    def tree(self, chance: Random) -> Tree:
        return [framing.hello(TOKEN), *[_write(chance) for _ in range(chance.randrange(4))]]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        stream = b"".join(map(_encoded, tree))
        return arrivals(stream, [chance.randrange(len(stream) + 1) for _ in range(chance.randrange(4))])

    def run(self, pieces: Pieces) -> None:
        server, sock = _Server(), ArrivingSocket(pieces)
        connection = _Connection(server, sock)  # type: ignore[arg-type]
        more = True
        while more and not connection.ended:
            more = sock.arrive()
            while not connection.ended and (sock.has_bytes or not more):
                connection._ready(READ)
        for block in range(NUM_BLOCKS):
            if not any(block in blocks for blocks in WINDOWS.values()):
                assert server.bytes_of(block) == {UNTOUCHED}, f"block {block} has changed, and no window covers it"
        for ticket, verdict in struct.iter_unpack("!6xHQ4x", bytes(sock.sent)):
            assert ticket in (framing.WRITTEN, framing.REFUSED), f"verdict {verdict} on write {ticket}"
        if connection.reason and connection.level >= logging.WARNING:
            raise FrameError(connection.reason)


class _Server(ReceiveRegion):
    """The part of a server that a connection needs."""

    def __init__(self) -> None:
        self.memory = bytearray([UNTOUCHED]) * (192 + 8 * NUM_BLOCKS)
        region: Any = SimpleNamespace(view=memoryview(self.memory), num_blocks=NUM_BLOCKS, rows=ROWS, fd=None)
        super().__init__(region, Outbox(lambda: None))
        for epoch, blocks in WINDOWS.items():
            self.admit(Window(epoch, blocks))
        self.token, self.loop, self.progress_s = TOKEN, StillLoop(), 1.0
        self.scratch = memoryview(bytearray(1 << 10))
        self.listener = SimpleNamespace(**dict.fromkeys(("served", "opened", "ended"), lambda connection: None))

    def bytes_of(self, block: int) -> set[int]:
        return {byte for at, size in ROWS for byte in self.memory[at + block * size : at + (block + 1) * size]}


class _Connection(SenderConnection):
    """Remembers why it has ended."""

    ended, reason, level = False, "", logging.DEBUG

    def end(self, reason: str, level: int = logging.WARNING) -> None:
        if not self.ended:
            self.ended, self.reason, self.level = True, reason, level
        super().end(reason, level)

    def __init__(self, server: Any, sock: Any) -> None:
        super().__init__(server, sock, ("192.0.2.1", 9))


def _write(chance: Random) -> list[Tree]:
    epoch = chance.choice(tuple(WINDOWS))
    ranges = []
    for _ in range(chance.choice((1, 2, 20))):
        base, size = chance.choice(ROWS)
        block, skip = chance.choice(WINDOWS[epoch]), chance.randrange(size)
        ranges.append([Number(base + block * size + skip, 8), Number(chance.randrange(size - skip + 1), 8)])
    payload = sum(length.value for _, length in ranges)
    head = [Number(epoch, 8), Number(chance.randrange(9), 8), Number(len(ranges), 4), Number(payload, 8)]
    return [head, ranges, chance.randbytes(payload)]


def _encoded(frame: Tree) -> bytes:
    """Returns a frame; a write whose parts are still there gets a right check, to test more than the check."""
    match frame:
        case [[Number(width=8), Number(width=8), Number(width=4), Number(width=8)] as head, ranges, data]:
            epoch, ticket, count, payload = (int.from_bytes(number.encoded()) for number in head)
            return framing.write_head(epoch, ticket, count, payload, packed(ranges)) + packed(data)
    return packed(frame)
