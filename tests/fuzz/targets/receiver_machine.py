"""Well-formed messages in any order to a receiver, with its pool: no block is lost, doubled or open to a writer."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from embferry.memory.admission import PoolAdmission
from embferry.memory.blocks import ReqToMetadataBlockAllocator
from embferry.protocol.commands import (
    Admit,
    CloseBlocks,
    Deliver,
    ReceiverCommand,
    Release,
    Restart,
    Revoke,
    Send,
    Verify,
)
from embferry.protocol.errors import Aborted, PeerGone, TransportError
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import TransportAddress
from embferry.protocol.ranges import RangeSet
from embferry.protocol.receiver import Receiver
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import TERMINAL
from tests.protocol.ends import LAYOUT, LanguageEnd
from tests.protocol.invariants import check_blocks, check_receiver

from ..engine import Target
from ..events import HERE, ROOM, check_sendable, encoded, events, message
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree

NUM_BLOCKS, SIZE = 8, 4
TRANSPORTS = ("tcp", "shm")
SETTINGS = TransferSettings(default_allocate_tokens=6, progress_rate=math.inf)
LONGEST = 2000
"""Turns within which a transfer that was aborted must have settled."""


class ReceiverMachine(Target):
    inputs = 1500
    bounds = Bounds(calls=200_000, calls_per_byte=400, memory=1 << 20, memory_per_byte=400)

    def tree(self, chance: Random) -> Tree:
        begun = [message(chance, _offer(chance, 1))] if chance.random() < 0.7 else []
        return begun + [chance.choice(EVENTS)(chance) for _ in range(chance.randrange(4, 30))]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return encoded(tree)

    def run(self, pieces: Pieces) -> None:
        language = _Language()
        language.advance()
        for name, arguments in events(pieces):
            language.play(name, arguments)
            language.advance()
        language.end()


class _Language:
    """One receiver, its pool, and what its commands have opened. The attributes are those that the invariants read."""

    def __init__(self) -> None:
        self.now = 0.0
        transports = tuple(TransportAddress(name, b"") for name in TRANSPORTS)
        geometry = Geometry(LAYOUT, NUM_BLOCKS, SIZE)
        machine = Receiver(ROOM, HERE, geometry, "tcp://h:1", transports, SETTINGS, self.now, failover_timeout=5.0)
        self.machine = machine
        self.end_of_room = LanguageEnd(ROOM, "", machine)
        self.allocator = ReqToMetadataBlockAllocator(NUM_BLOCKS, SIZE)
        self.admission = PoolAdmission(self.allocator)
        self.admission.register(machine)
        self.orphans: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.open: dict[int, set[int]] = {}  # blocks that a writer may write, by epoch
        self.revoking: list[int] = []
        self.checks: list[Verify] = []
        self.queue: list[Deliver] = []

    def living_receivers(self) -> list[LanguageEnd]:
        return [self.end_of_room]

    def play(self, name: str, arguments: list[Any]) -> None:
        at = arguments[0] if arguments else 0
        machine = self.machine
        match name:
            case "message":
                machine.receive(*arguments, self.now)
            case "tick":
                self.tick(at % 64 / 4)
            case "verify" if self.checks:
                check = self.checks.pop(at % len(self.checks))
                machine.verified_chunk(check.epoch, check.offset, matches=at % 8 > 0, now=self.now)
            case "consume" if self.queue:
                chunk = self.queue.pop(at % len(self.queue))
                machine.committed = True
                machine.consumed(chunk.epoch, chunk.offset)
            case "revoked" if self.revoking:
                epoch = self.revoking.pop(at % len(self.revoking))
                machine.revoked(epoch)
            case "receiving":
                machine.receiving(at % 9, self.now)
            case "lost":
                machine.peer_lost(self.now)
            case "redirected":
                machine.redirected(self.now)
            case "unreachable":
                machine.peer_unreachable(PeerGone("refused"), self.now)
            case "transport lost":
                machine.transport_lost(TRANSPORTS[at % 2], TransportError("the engine has failed"), self.now)
            case "clear":
                self.queue.clear()
                machine.clear(self.now)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.machine.expire(self.now)
        due = self.machine.next_timeout()
        assert due is None or due > self.now, f"the timer stays at {due}, which has passed"

    def advance(self) -> None:
        """Executes the commands, grants free blocks, and checks the invariants."""
        while commands := self.machine.take_commands():
            for command in commands:
                self._execute(command)
            self.admission.update(self.machine, is_waiting=self.machine.wanted(self.now) is not None)
            self.admission.allocate(self.now)
        check_blocks(self)  # type: ignore[arg-type]
        check_receiver(self.end_of_room)

    def _execute(self, command: ReceiverCommand) -> None:
        match command:
            case Send(body, target):
                check_sendable(body, HERE, target)
            case Admit(epoch, blocks, transport):
                assert not set(blocks) & self._writable(), "a block is opened to two writers"
                assert transport in {address.name for address in self.machine.transports}, "over a lost transport"
                self.open[epoch] = set(blocks)
            case CloseBlocks(epoch, blocks):
                self.open[epoch] -= set(blocks)
            case Revoke(epoch):
                self.revoking.append(epoch)
            case Verify():
                assert not set(command.blocks) & self._writable(), "bytes are verified while a writer may change them"
                self.checks.append(command)
            case Deliver(_, offset, length, _):
                assert not self.end_of_room.delivered.overlaps(offset, offset + length), "tokens are delivered twice"
                self.end_of_room.delivered.add(offset, offset + length)
                self.queue.append(command)
            case Release(blocks):
                assert not set(blocks) & self._writable(), "a block returns to the pool while a writer may write it"
                self.allocator.free(blocks, ROOM)
            case Restart():
                assert not self.machine.committed, "tokens that were used are discarded"
                self.end_of_room.delivered = RangeSet()
                self.queue.clear()

    def _writable(self) -> set[int]:
        return {block for blocks in self.open.values() for block in blocks}

    def end(self) -> None:
        """Aborts, lets everything that is under way end, and expects all blocks back in the pool."""
        self.machine.abort(Aborted("asked for"), self.now)
        for _ in range(LONGEST):
            self.advance()
            if self.machine.settled(self.now):
                break
            for name in ("verify", "consume", "revoked"):
                self.play(name, [1])
            self.advance()
            due = self.machine.next_timeout()
            self.tick(1.0 if due is None else max(due - self.now, 0.01))
        assert self.machine.settled(self.now), f"an ended transfer does not settle: {self.machine.phase}"
        assert self.machine.phase in TERMINAL, "an aborted transfer goes on"
        assert self.allocator.available == NUM_BLOCKS, "blocks are missing from the pool"


def _offer(chance: Random, generation: int) -> list[Any]:
    total = chance.choice((-1, 0, 3, 8, 21, 60))
    digest = chance.choice((b"content", b"content", b"another")) if total >= 0 else b""
    return ["offer", ROOM, generation, 1, chance.choice(("tcp", "tcp", "shm")), total, digest, [total, 3], b""]


def _written(chance: Random) -> list[Any]:
    chunks = [[SIZE * chance.randrange(6), SIZE * chance.choice((1, 1, 2)), b"checksum"] for _ in range(chance.randrange(1, 4))]
    return ["written", ROOM, chance.randrange(1, 7), chunks]


def _body(chance: Random) -> list[Any]:
    """Returns a message of a sender, with numbers that are likely to fit the state."""
    epoch, offset = chance.randrange(1, 7), SIZE * chance.randrange(6)
    return chance.choice(
        (
            lambda: _offer(chance, chance.randrange(1, 5)),
            lambda: _offer(chance, chance.randrange(1, 5)),
            lambda: _written(chance),
            lambda: _written(chance),
            lambda: _written(chance),
            lambda: ["write_failed", ROOM, epoch, offset, SIZE, "transport_error", "broke", chance.random() < 0.8],
            lambda: ["drained", ROOM, [epoch, chance.randrange(7)]],
            lambda: ["pending", ROOM, chance.choice((0, epoch))],
            lambda: ["closed", ROOM],
            lambda: ["unknown", ROOM, chance.choice((200, 201, 0))],
            lambda: ["abort", ROOM, "aborted", "asked for", chance.randrange(5)],
        )
    )()


def _event(name: str) -> Any:
    return lambda chance: [name, chance.randrange(64)]


EVENTS = (
    *[lambda chance: message(chance, _body(chance))] * 8,
    *map(_event, ("tick", "verify", "verify", "verify", "consume", "consume", "revoked", "receiving")),
    *map(_event, ("lost", "redirected", "unreachable", "transport lost", "clear")),
)
