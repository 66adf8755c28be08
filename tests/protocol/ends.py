"""The two kinds of end in the simulation, and the embeddings they transfer."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from embferry.protocol.commands import Deliver, Verify
from embferry.protocol.kept import KeptTokens
from embferry.protocol.layout import Field, Layout
from embferry.protocol.ranges import RangeSet
from embferry.protocol.receiver import Receiver
from embferry.protocol.sender import Sender

TOKEN_BYTES = 8
LAYOUT = Layout((Field("input_embeddings", "uint8", TOKEN_BYTES),))
UNREADY = b"\xee" * TOKEN_BYTES  # the bytes of a token that has not been produced


class InvariantError(AssertionError):
    """An invariant of the simulation is broken."""


def must(condition: bool, otherwise: str) -> None:
    """Raises :class:`InvariantError` with the text ``otherwise`` unless the condition holds."""
    if not condition:
        raise InvariantError(otherwise)


@dataclass(frozen=True)
class Content:
    """An embedding, identified by a number."""

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
    """A sender, the embedding it reads from, and its address."""

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
    """A receiver, its chunks to verify and to consume, and what the invariants need to remember about it.

    Attributes:
        opened_at: The step at which its latest generation was opened.
        generation: Its latest generation.
        checks: Chunks to verify.
        queue: Delivered chunks that the consumer has not used.
        delivered: Tokens of the current content that were delivered.
        consumed: Tokens that the consumer has used.
        best: The transferred tokens at the last check, by content digest.
        peer: The peer's session at the last check.
        kept: The content of the tokens that it has begun with, as long as they are in use.
    """

    room: int
    endpoint: str
    machine: Receiver
    alive: bool = True
    opened_at: int = 0
    generation: int = 0
    checks: list[Verify] = field(default_factory=list)
    queue: list[Deliver] = field(default_factory=list)
    delivered: RangeSet = field(default_factory=RangeSet)
    consumed: RangeSet = field(default_factory=RangeSet)
    best: dict[bytes | None, int] = field(default_factory=dict)
    peer: int = 0
    kept: bytes | None = None

    def has(self) -> KeptTokens | None:
        """Returns what another process could keep of it; None: nothing."""
        m = self.machine
        if m.content_digest is None or not self.delivered:
            return None
        return KeptTokens(m.total_tokens, m.content_digest, tuple(self.delivered))

    def blocks(self) -> list[int]:
        """Returns every block that the machine counts as its own."""
        m = self.machine
        found = [block for grant in m.ledger for block in grant.open_blocks()]
        found += [block for check in m.ledger.checking.values() for block in check.blocks]
        return found + [block for blocks in m.ledger.held.values() for block in blocks]
