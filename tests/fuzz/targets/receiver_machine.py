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
from embferry.protocol.ledger import OutstandingGrant
from embferry.protocol.messages import Chunk, Drained, Offer, TransportAddress, Written
from embferry.protocol.ranges import RangeSet
from embferry.protocol.receiver import Receiver
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import TERMINAL
from tests.protocol.ends import LAYOUT, LanguageEnd
from tests.protocol.invariants import check_blocks, check_receiver

from ..engine import Target
from ..events import HERE, ROOM, STRANGERS, Draw, check_sendable, encoded, events
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
        first = [[DRAW.code("offer"), chance.randrange(1, 64)]] if chance.random() < 0.9 else []
        return first + [DRAW.event(chance) for _ in range(chance.randrange(4, 40))]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return encoded(tree)

    def run(self, pieces: Pieces) -> None:
        language = _Language()
        language.advance()
        for name, arguments in events(pieces, DRAW.names):
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
        self.content: tuple[int, bytes] | None = None  # length and digest that the senders announce
        self.checks: list[Verify] = []
        self.damaged: set[tuple[int, int]] = set()  # chunks with other bytes than were announced
        self.queue: list[Deliver] = []

    def living_receivers(self) -> list[LanguageEnd]:
        return [self.end_of_room]

    def play(self, name: str, arguments: list[Any]) -> None:
        at = arguments[0] if arguments else 0
        machine = self.machine
        match name:
            case "message":
                machine.receive(*arguments, self.now)
            case "offer":
                self._offer(at)
            case "report" if grants := list(machine.ledger):
                self._report(grants[at % len(grants)], at)
            case "tick":
                self.tick(at % 64 / 4)
            case "verify" if self.checks:
                check = self.checks.pop(at % len(self.checks))
                self.damaged |= {(check.epoch, check.offset)} if at % 8 == 0 else set()
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

    def _offer(self, at: int) -> None:
        """A sender answers the latest ``open``; mostly with what it, or the sender before it, has said already."""
        machine = self.machine
        source = machine.peer or STRANGERS[at % 2]
        self.content = _content(at) if at % 16 == 0 else self.content or _content(at)
        total, digest = (-1, b"") if at % 5 == 0 and machine.total_tokens < 0 else self.content
        transports = machine.transports[at // 5 % len(machine.transports)]
        body = Offer(ROOM, machine.generation, 1, transports.name, total, digest, (3,) if total >= 0 else ())
        machine.receive(source, HERE, body, self.now)

    def _report(self, grant: OutstandingGrant, at: int) -> None:
        """The writer of a grant reports one of its chunks, or that it writes no more."""
        machine, start = self.machine, grant.start + at // 8 % len(grant.blocks) * SIZE
        if at % 8 == 0:
            machine.receive(grant.writer, HERE, Drained(ROOM, (grant.epoch,)), self.now)
        elif start < grant.stop:
            chunk = Chunk(start, min(SIZE, grant.stop - start), b"checksum")
            machine.receive(grant.writer, HERE, Written(ROOM, grant.epoch, (chunk,)), self.now)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.machine.expire(self.now)
        due = self.machine.next_timeout()
        assert due is None or due > self.now, f"the timer stays at {due}, which has passed"

    def advance(self) -> None:
        """Executes the commands, grants free blocks, and checks the invariants."""
        granted = True
        while granted:
            for command in self.machine.take_commands():
                self._execute(command)
            self.admission.update(self.machine, self.now)
            granted = bool(self.admission.allocate(self.now))
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
            case Deliver(epoch, offset, length, _):
                assert (epoch, offset) not in self.damaged, "damaged tokens are delivered"
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


def _content(at: int) -> tuple[int, bytes]:
    total = (0, 3, 8, 21, 21, 40, 60, 90)[at // 2 % 8]
    return total, f"content {total}".encode()


def _written(chance: Random) -> list[Any]:
    epoch = chance.randrange(1, 7)
    starts = [8 * (epoch - 1) + chance.choice((0, 4)) for _ in range(chance.randrange(1, 3))]
    return ["written", ROOM, epoch, [[start, chance.choice((4, 4, 8)), b"checksum"] for start in starts]]


def _foreign_offer(chance: Random) -> list[Any]:
    total = chance.choice((-1, 0, 3, 8, 21, 60))
    digest = chance.choice((b"content 21", b"another")) if total >= 0 else b""
    return ["offer", ROOM, chance.randrange(1, 5), 1, chance.choice(("tcp", "shm")), total, digest, [3], b""]


def _body(chance: Random) -> list[Any]:
    """Returns a message of a sender, with numbers that may fit the state."""
    epoch = chance.randrange(1, 7)
    offset = 8 * (epoch - 1) + chance.choice((0, 4))
    kind = chance.choice(
        ("written",) * 6 + ("failed",) * 2 + ("drained", "drained", "pending", "closed", "unknown", "offer", "abort")
    )
    match kind:
        case "written":
            return _written(chance)
        case "failed":
            return ["write_failed", ROOM, epoch, offset, SIZE, "transport_error", "broke", chance.random() < 0.9]
        case "drained":
            return ["drained", ROOM, [epoch, chance.randrange(7)]]
        case "pending":
            return ["pending", ROOM, chance.choice((0, epoch))]
        case "closed":
            return ["closed", ROOM]
        case "unknown":
            return ["unknown", ROOM, chance.choice((200, 201, 0))]
        case "offer":
            return _foreign_offer(chance)
    return ["abort", ROOM, "aborted", "asked for", chance.randrange(5)]


WEIGHTS = {
    "message": 6,
    "offer": 3,
    "report": 12,
    "verify": 10,
    "consume": 8,
    "revoked": 4,
    "tick": 2,
    "receiving": 1,
    "lost": 1,
    "redirected": 0.5,
    "unreachable": 0.3,
    "transport lost": 0.3,
    "clear": 0.2,
}
"""How often each event is drawn. Few of those that end a transfer, or nothing else would be seen."""
DRAW = Draw(WEIGHTS, _body)
