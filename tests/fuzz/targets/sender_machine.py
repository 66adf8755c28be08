"""Well-formed messages in any order to a sender: it writes what was granted, once, and nothing after its promises."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from embferry.protocol.commands import Connect, ReleaseSource, Send, SenderCommand, Write
from embferry.protocol.errors import Aborted, TransportError
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import Drained, Open, TransportAddress, Written
from embferry.protocol.sender import Sender
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import TERMINAL, Phase
from tests.protocol.ends import LAYOUT, TOKEN_BYTES

from ..engine import Target
from ..events import HERE, ROOM, Draw, check_sendable, encoded, events, message
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, fresh

NUM_BLOCKS, SIZE, TOTAL = 16, 4, 40
TRANSPORTS = ("shm", "tcp")
SETTINGS = TransferSettings(chunk_bytes=2 * SIZE * TOKEN_BYTES, writes_in_flight=3)
Key = tuple[int, int, int]
"""A write: the receiver's session, the epoch, the first token."""


class SenderMachine(Target):
    inputs = 2500
    bounds = Bounds(calls=60_000, calls_per_byte=400, memory=1 << 20, memory_per_byte=400)

    def tree(self, chance: Random) -> Tree:
        begun = [[DRAW.code("announce"), 0], [DRAW.code("produce"), 40], message(chance, _open(chance, 1))]
        begun = begun if chance.random() < 0.8 else []
        return begun + [DRAW.event(chance) for _ in range(chance.randrange(4, 30))]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return encoded(tree)

    def run(self, pieces: Pieces) -> None:
        encode = _Encode()
        for name, arguments in events(pieces, DRAW.names):
            encode.play(name, arguments)
            encode.advance()
        encode.end()


class _Encode:
    """One sender, the writes that it has started, and its promises."""

    def __init__(self) -> None:
        self.now = 0.0
        transports = tuple(TransportAddress(name, b"") for name in TRANSPORTS)
        self.machine = Sender(ROOM, HERE, LAYOUT, transports, SETTINGS, self.now)
        self.geometries: dict[int, Geometry] = {}  # by the session that has opened the room
        self.in_flight: list[Write] = []
        self.started: set[Key] = set()
        self.ended: set[Key] = set()
        self.promised: set[tuple[int, int]] = set()  # session and epoch of what was reported as drained
        self.released = False

    def play(self, name: str, arguments: list[Any]) -> None:
        at = arguments[0] if arguments else 0
        machine = self.machine
        match name:
            case "message":
                source, _, body = arguments
                if isinstance(body, Open):
                    self.geometries.setdefault(source, body.geometry)
                machine.receive(*arguments, self.now)
            case "announce":
                machine.announce(TOTAL, b"content")
            case "produce" if machine.total_tokens >= 0:
                machine.produce(max(machine.ready_tokens, at % (TOTAL + 1)))
            case "done" if self.in_flight:
                write = self._end_write(at)
                machine.write_done(write.target, write.epoch, write.offset, write.length, b"checksum")
            case "failed" if self.in_flight:
                write = self._end_write(at)
                error = TransportError("the link broke", retryable=at % 4 > 0)
                machine.write_failed(write.target, write.epoch, write.offset, write.length, error)
            case "transport lost":
                machine.transport_lost(TRANSPORTS[at % 2], TransportError("the engine has failed"), self.now)
            case "tick":
                self.now += at % 64 / 4
                machine.expire(self.now)
                due = machine.next_timeout()
                assert due is None or due > self.now, f"the timer stays at {due}, which has passed"
            case "abort":
                machine.abort(Aborted("asked for"), self.now)

    def _end_write(self, at: int) -> Write:
        write = self.in_flight.pop(at % len(self.in_flight))
        self.ended.add((write.target, write.epoch, write.offset))
        return write

    def advance(self) -> None:
        """Executes the commands, and checks the invariants."""
        for command in self.machine.take_commands():
            self._execute(command)
        m = self.machine
        assert m.writes_in_flight == len(self.in_flight) <= SETTINGS.writes_in_flight, "a write is not counted"
        assert (m.phase is Phase.FAILED) == (m.error is not None), "failed without an error, or the other way round"
        assert m.source_released == self.released, "the release of the source was not commanded"

    def _execute(self, command: SenderCommand) -> None:
        match command:
            case Send(body, target):
                check_sendable(body, HERE, target)
                self._check_promise(body, target)
            case Write():
                self._check_write(command)
                self.in_flight.append(command)
                self.started.add((command.target, command.epoch, command.offset))
            case Connect(target, transport):
                assert target in self.geometries
                assert transport.name in TRANSPORTS
            case ReleaseSource():
                assert not self.in_flight, "the embedding is freed while a write reads it"
                self.released = True

    def _check_promise(self, body: object, target: int) -> None:
        if isinstance(body, Drained):
            self.promised.update((target, epoch) for epoch in body.epochs)
            under_way = {(write.target, write.epoch) for write in self.in_flight}
            assert not under_way & self.promised, "drained, and a write is in flight"
        if isinstance(body, Written):
            reported = {(target, body.epoch, chunk.offset) for chunk in body.chunks}
            assert reported <= self.ended, "a chunk is reported before its write has ended"

    def _check_write(self, write: Write) -> None:
        geometry = self.geometries[write.target]
        assert (write.target, write.epoch, write.offset) not in self.started, "tokens are written twice under an epoch"
        assert (write.target, write.epoch) not in self.promised, "a write after the promise that there is none"
        assert not self.released, "a write reads memory that has been freed"
        assert write.length > 0, "a write of nothing"
        assert write.offset + write.length <= self.machine.ready_tokens, "tokens are written before they are there"
        assert len(write.blocks) == -(-write.length // geometry.block_size), "blocks do not fit the tokens"
        assert len(set(write.blocks)) == len(write.blocks), "a block twice in one write"
        assert all(0 <= block < geometry.num_blocks for block in write.blocks), "a write outside of the region"

    def end(self) -> None:
        """Aborts, lets the writes end, and expects the embedding to be released."""
        self.play("abort", [])
        self.advance()
        while self.in_flight:
            self.play("done", [0])
            self.advance()
        assert self.machine.phase in TERMINAL, "an aborted transfer goes on"
        assert self.released, "an aborted transfer keeps its embedding"
        assert self.machine.settled(self.now + SETTINGS.linger), "an ended transfer does not settle"


GEOMETRY = msgspec.to_builtins(Geometry(LAYOUT, NUM_BLOCKS, SIZE))


def _open(chance: Random, generation: int) -> list[Any]:
    names = chance.choice((TRANSPORTS, TRANSPORTS, ("tcp",)))
    transports = [[name, b""] for name in names]
    return ["open", ROOM, generation, [1, 1], fresh(GEOMETRY), "tcp://h:1", transports, 0, True]


def _grant(chance: Random) -> list[Any]:
    blocks = chance.randrange(1, 5)
    first = chance.randrange(NUM_BLOCKS - 4)
    tokens = SIZE * blocks - chance.choice((0, 0, 0, 2))
    runs = [[first, blocks]] if chance.random() < 0.7 else [[(first + 2 * n) % NUM_BLOCKS, 1] for n in range(blocks)]
    at = SIZE * chance.randrange(10)
    return [
        "grant",
        ROOM,
        chance.randrange(1, 7),
        at,
        tokens,
        runs,
        chance.choice((0, 0, 2)),
        chance.choice(TRANSPORTS),
    ]


def _body(chance: Random) -> list[Any]:
    """Returns a message of a receiver, with numbers that are likely to fit the state."""
    epoch = chance.randrange(1, 7)
    return chance.choice(
        (
            lambda: _open(chance, chance.randrange(1, 4)),
            lambda: _grant(chance),
            lambda: _grant(chance),
            lambda: _grant(chance),
            lambda: ["progress", ROOM, chance.randrange(TOTAL), chance.choice((0, epoch))],
            lambda: ["drain", ROOM, [epoch, chance.randrange(7)]],
            lambda: ["confirm", ROOM, chance.choice((TOTAL, 3))],
            lambda: ["abort", ROOM, "aborted", "asked for", 0],
        )
    )()


WEIGHTS = {
    "message": 8,
    "announce": 1,
    "produce": 1,
    "done": 3,
    "failed": 1,
    "tick": 0.5,
    "transport lost": 0.2,
    "abort": 0.1,
}
"""How often each event is drawn."""
DRAW = Draw(WEIGHTS, _body)
