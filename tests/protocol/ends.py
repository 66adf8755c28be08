"""The two kinds of end in the simulated world, and what an embedding is made of there."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from embferry.protocol.commands import Deliver, Verify
from embferry.protocol.layout import Field, Layout
from embferry.protocol.ranges import RangeSet
from embferry.protocol.receiver import Receiver
from embferry.protocol.sender import Sender

TOKEN_BYTES = 8
LAYOUT = Layout((Field("input_embeddings", "uint8", TOKEN_BYTES),))
UNREADY = b"\xee" * TOKEN_BYTES  # what lies where the encoder has not written yet


class InvariantError(AssertionError):
    """What must never happen has happened."""


def must(holds: bool, what: str) -> None:
    """Raises :class:`InvariantError` unless it holds."""
    if not holds:
        raise InvariantError(what)


@dataclass(frozen=True)
class Content:
    """An embedding: which one, and how long."""

    number: int
    total: int

    @property
    def digest(self) -> bytes:
        return struct.pack(">II", self.number, self.total)

    def token(self, index: int) -> bytes:
        return struct.pack(">II", self.number, index)

    @classmethod
    def of(cls, digest: bytes) -> Content:
        return cls(*struct.unpack(">II", digest))


@dataclass(eq=False)
class EncodeEnd:
    """A sender, its memory, and where it listens."""

    room: int
    address: str
    content: Content
    machine: Sender
    alive: bool = True
    died_at: int | None = None
    released: bool = False

    def read(self, token: int) -> bytes:
        must(not self.released, f"room {self.room}: a write reads token {token} of memory that has been freed")
        return self.content.token(token) if token < self.machine.ready_tokens else UNREADY

    def produce(self, ready: int) -> None:
        self.machine.announce(self.content.total, self.content.digest)
        self.machine.produce(max(min(ready, self.content.total), self.machine.ready_tokens))


@dataclass(eq=False)
class LanguageEnd:
    """A receiver, its consumer, and what has been promised to it."""

    room: int
    endpoint: str
    machine: Receiver
    alive: bool = True
    opened_at: int = 0
    asked_for: int = 0  # the number of its latest opening
    checks: list[Verify] = field(default_factory=list)
    queue: list[Deliver] = field(default_factory=list)
    delivered: RangeSet = field(default_factory=RangeSet)
    consumed: RangeSet = field(default_factory=RangeSet)
    best: dict[bytes | None, int] = field(default_factory=dict)  # digest: tokens transferred
    peer: int = 0

    def blocks(self) -> list[int]:
        """Every block that the machine says is its own."""
        m = self.machine
        found = [block for grant in m.ledger for block in grant.open_blocks()]
        found += [block for check in m.ledger.checking.values() for block in check.blocks]
        return found + [block for blocks in m.ledger.held.values() for block in blocks]
