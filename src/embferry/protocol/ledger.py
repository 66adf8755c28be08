"""The receiver's ledger: which writer has access to which blocks, which blocks are its own, which tokens are verified.

A block of a grant is *open* while the writer may write to it. It leaves the grant in one of three ways: the writer
reports the chunk that fills it; the announced length shows that no chunk will fill it; or the whole grant is drained or
revoked. A block that has left belongs to the receiver: it is verified, then held for the consumer, then released.

A grant that no longer counts is in quarantine. It is *draining* until its writer says that it is done, and *revoking*
once this takes too long or the writer is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from . import guards
from .errors import RemoteProtocolError
from .kept import KeptTokens
from .layout import merged
from .messages import Grant
from .ranges import RangeSet


@dataclass(slots=True)
class OutstandingGrant:
    """Tokens ``[start, start + tokens)`` fill ``blocks`` in order; ``open_tokens`` may still be written."""

    epoch: int
    writer: int  # session of the sender that was granted the blocks
    start: int
    tokens: int
    blocks: tuple[int, ...]
    block_size: int
    transport: str
    runs: int  # of adjacent blocks
    open_tokens: RangeSet = field(default_factory=RangeSet)
    draining: bool = False
    drained: bool = False
    revoking: bool = False
    revoked: bool = False
    drain_deadline: float = 0.0

    def __post_init__(self) -> None:
        self.open_tokens.add(self.start, self.stop)

    @property
    def stop(self) -> int:
        return self.start + self.tokens

    def blocks_of(self, start: int, stop: int) -> tuple[int, ...]:
        """Returns the blocks that tokens ``[start, stop)`` fill."""
        first = (start - self.start) // self.block_size
        return self.blocks[first : -(-(stop - self.start) // self.block_size)]

    def open_blocks(self) -> tuple[int, ...]:
        return tuple(block for start, stop in self.open_tokens for block in self.blocks_of(start, stop))

    def is_whole_blocks(self, start: int, stop: int) -> bool:
        """Returns whether a chunk begins and ends on block boundaries of the grant, or at its end."""
        ends = stop == self.stop or (stop - self.start) % self.block_size == 0
        return self.start <= start < stop <= self.stop and (start - self.start) % self.block_size == 0 and ends

    def message(self, room: int, floor: int) -> Grant:
        return Grant(room, self.epoch, self.start, self.tokens, tuple(merged(self.blocks)), floor, self.transport)


@dataclass(slots=True)
class Check:
    """A reported chunk whose checksum is being compared."""

    length: int
    blocks: tuple[int, ...]
    outdated: bool = False  # its content has been replaced


Key = tuple[int, int]
"""A chunk: its epoch and its first token."""


class Ledger:
    """All blocks and tokens of one transfer. Iterating yields the outstanding grants, epochs ascending.

    Args:
        kept: Tokens that are verified already. They lie in no block.
    """

    def __init__(self, kept: KeptTokens | None = None) -> None:
        self.grants: dict[int, OutstandingGrant] = {}
        self.checking: dict[Key, Check] = {}
        self.held: dict[Key, tuple[int, ...]] = {}  # verified, in use by the consumer
        self.verified = RangeSet() if kept is None else kept.verified()
        self.next_epoch = 1  # one past the last epoch used
        self.open_runs = 0  # of adjacent blocks, in the outstanding grants

    def __iter__(self) -> Iterator[OutstandingGrant]:
        return iter(list(self.grants.values()))

    @property
    def floor(self) -> int:
        """Every epoch below it is closed."""
        return next(iter(self.grants), self.next_epoch)

    @property
    def active(self) -> list[OutstandingGrant]:
        """Grants whose tokens still count."""
        return [grant for grant in self if not grant.draining]

    @property
    def is_active(self) -> bool:
        """Whether any grant still counts."""
        return any(not grant.draining for grant in self.grants.values())

    def blocks(self) -> set[int]:
        """Returns every block that the transfer holds."""
        found = [grant.open_blocks() for grant in self]
        found += [check.blocks for check in self.checking.values()] + list(self.held.values())
        return {block for blocks in found for block in blocks}

    def open(self, grant: OutstandingGrant) -> None:
        self.grants[grant.epoch] = grant
        self.next_epoch = grant.epoch + 1
        self.open_runs += grant.runs

    def _remove(self, grant: OutstandingGrant) -> None:
        del self.grants[grant.epoch]
        self.open_runs -= grant.runs

    def take_chunk(self, epoch: int, start: int, stop: int) -> tuple[int, ...] | None:
        """Takes the blocks of tokens that the writer has reported out of their grant.

        Returns:
            The blocks. None if the report is repeated, or its epoch no longer counts.

        Raises:
            RemoteProtocolError: The tokens are not whole blocks of the grant.
        """
        grant = self.grants.get(epoch)
        if grant is None or not guards.epoch_is_current(grant.draining):
            return None
        if not grant.is_whole_blocks(start, stop):
            why = f"tokens [{start}, {stop}) were reported, not whole blocks of [{grant.start}, {grant.stop})"
            raise RemoteProtocolError(why)
        if not guards.is_first_report(grant.open_tokens, start, stop):
            return None
        grant.open_tokens.discard(start, stop)
        if not grant.open_tokens:
            self._remove(grant)
        return grant.blocks_of(start, stop)

    def trim(self, total: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Takes blocks beyond the announced length, which no write will fill, out of their grants.

        Yields:
            (epoch, blocks) for each grant that has such blocks.
        """
        for grant in self:
            if grant.draining or grant.stop <= total:
                continue
            kept = max(0, -(-(total - grant.start) // grant.block_size))
            spare, grant.blocks = grant.blocks[kept:], grant.blocks[:kept]
            cut = max(total, grant.start)
            grant.open_tokens.discard(cut, grant.stop)
            grant.tokens = cut - grant.start
            if not grant.open_tokens:
                self._remove(grant)
            if spare:
                yield grant.epoch, spare

    def close(self, grant: OutstandingGrant) -> tuple[int, ...]:
        """Removes a grant if its writer has no access any more. Returns the blocks that were still open, or ()."""
        if not guards.may_release(grant.drained, grant.revoked):
            return ()
        self._remove(grant)
        return grant.open_blocks()

    def missing(self, total: int) -> tuple[int, int] | None:
        """Returns the first tokens below ``total`` that have neither arrived nor been granted, as (offset, length)."""
        if self.verified.prefix >= total:
            return None
        found = [*self.verified, (total, total)]
        for grant in self.grants.values():
            if not grant.draining:
                found += grant.open_tokens
        for (_, at), check in self.checking.items():
            if not check.outdated:
                found.append((at, at + check.length))
        end = 0
        for start, stop in sorted(found):
            if start > end:
                return (end, start - end) if end < total else None
            end = max(end, stop)
        return None

    def is_untouched(self) -> bool:
        """Returns whether nothing is granted, being verified or verified."""
        return not (self.active or self.checking or self.verified)

    def start_over(self) -> None:
        """Forgets the tokens that are verified or being verified: their content has been replaced."""
        self.verified = RangeSet()
        for check in self.checking.values():
            check.outdated = True
