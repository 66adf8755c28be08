"""A sender's memory of one receiver: its grants, and the reports on each."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import guards
from .errors import RemoteProtocolError, TransportError
from .messages import Chunk, Grant, Open, WriteFailed
from .runs import Runs
from .transport_selector import TransportSelector
from .validation import MAX_GRANTS, MAX_OPEN_RUNS, MAX_REPORTS


@dataclass(slots=True)
class TakenGrant:
    """A grant that the sender has accepted.

    Attributes:
        epoch: Its number.
        start: Its first token.
        stop: One past its last token.
        transport: The name of the transport over which its blocks are open.
        runs: Its blocks, as long as a write can still be started.
        cursor: The next token to write.
        in_flight: Chunks being written: first token to ordinal of the write.
        written: Reported chunks, kept to be repeated on request.
        failed: Reported failures, kept likewise.
        cancelled: Whether no further write of it will be started.
    """

    epoch: int
    start: int
    stop: int
    transport: str
    runs: Runs
    cursor: int
    in_flight: dict[int, int] = field(default_factory=dict)
    written: list[Chunk] = field(default_factory=list)
    failed: list[WriteFailed] = field(default_factory=list)
    cancelled: bool = False

    @property
    def reports(self) -> int:
        """Number of reports that are kept."""
        return len(self.written) + len(self.failed)

    def blocks_of(self, start: int, stop: int, block_size: int) -> tuple[int, ...]:
        """Returns the blocks that tokens ``[start, stop)`` go to."""
        first = (start - self.start) // block_size
        return self.runs.between(first, first + -(-(stop - start) // block_size))


@dataclass(slots=True)
class Destination:
    """One receiver session that has opened the room.

    Attributes:
        session: The receiver's session.
        opened: Its latest ``open`` message.
        version: The protocol version in use with it.
        transports: The transports shared with it.
        grants: Accepted grants by epoch, kept until the floor has passed them.
        unfinished: Those of them of which a write can still be started.
        open_runs: Runs of blocks in the unfinished grants.
        reports: Reports kept in all grants.
        refused: Epochs that were drained: never written, or not any further.
        draining: Epochs to report as drained when their writes in flight have ended.
        floor: Every epoch below it is closed.
    """

    session: int
    opened: Open
    version: int
    transports: TransportSelector
    grants: dict[int, TakenGrant] = field(default_factory=dict)
    unfinished: dict[int, TakenGrant] = field(default_factory=dict)
    open_runs: int = 0
    reports: int = 0
    refused: set[int] = field(default_factory=set)
    draining: set[int] = field(default_factory=set)
    floor: int = 0

    @property
    def block_size(self) -> int:
        return self.opened.geometry.block_size

    def reopen(self, body: Open) -> None:
        """Handles another ``open`` of the same session. A higher generation means that it has revoked all its grants.

        With it, the session may name fewer transports than before: it has lost the others.

        Raises:
            RemoteProtocolError: Its buffers or a handle have changed, or it names a transport that it did not name.
            TransportError: No common transport is left.
        """
        newer = body.generation > self.opened.generation
        before, now = set(self.opened.transports), set(body.transports)
        if body.geometry != self.opened.geometry or not (now <= before if newer else now == before):
            raise RemoteProtocolError("a session opened the room again with other buffers or transports")
        lost = {address.name for address in before - now}
        if not self.transports.has_other_than(lost):
            raise TransportError("no transport that both ends have is left", retryable=False)
        self.transports.lose(lost)
        if newer:
            self.forget_all()
        self.opened = body

    def can_take(self, grant: Grant) -> bool:
        """Returns whether so many more blocks and grants may be remembered. A correct receiver asks for no more."""
        return len(self.grants) < MAX_GRANTS and self.open_runs + len(grant.runs) <= MAX_OPEN_RUNS

    def can_report(self, writes_in_flight: int) -> bool:
        """Returns whether the report of another write may be kept. A correct receiver closes grants before that."""
        return self.reports + writes_in_flight < MAX_REPORTS

    def report(self, taken: TakenGrant, report: Chunk | WriteFailed) -> None:
        """Keeps a report, to be repeated on request."""
        if isinstance(report, Chunk):
            taken.written.append(report)
        else:
            taken.failed.append(report)
        self.reports += 1

    def take(self, grant: Grant, runs: Runs) -> TakenGrant:
        """Remembers a grant of ``runs`` that is about to be written."""
        start, stop = grant.sent_tokens, grant.sent_tokens + grant.allocated_tokens
        taken = TakenGrant(grant.epoch, start, stop, grant.transport, runs, start)
        self.grants[grant.epoch] = self.unfinished[grant.epoch] = taken
        self.open_runs += len(runs)
        return taken

    def overtaken_by(self, taken: TakenGrant) -> list[TakenGrant]:
        """Returns each grant of which unwritten tokens were granted again, by ``taken`` or before ``taken`` arrived."""
        pairs = [(other, taken) for other in self.unfinished.values() if other.epoch < taken.epoch]
        pairs += [(taken, other) for other in self.grants.values() if other.epoch > taken.epoch]
        return [a for a, later in pairs if not guards.still_needed(a.cursor, a.stop, later.start, later.stop)]

    def finish(self, taken: TakenGrant) -> None:
        """Forgets the blocks of a grant: no further write of it will be started."""
        if self.unfinished.pop(taken.epoch, None):
            self.open_runs -= len(taken.runs)
            taken.runs = Runs()

    def cancel(self, taken: TakenGrant) -> None:
        """Starts no further write: the receiver revokes the grant, and rejects writes that are in flight."""
        taken.cursor = taken.stop
        taken.cancelled = True
        self.finish(taken)

    def forget_all(self) -> None:
        """The receiver has revoked every grant that it has made so far, or will have done so when it opens again."""
        self.forget_below(1 + max((*self.grants, *self.refused), default=-1))

    def refuse(self, epoch: int) -> bool:
        """Marks an epoch as never to be written any further. Returns False if too many are remembered already."""
        if epoch >= self.floor and epoch not in self.refused:
            if len(self.refused) >= MAX_GRANTS:
                return False
            self.refused.add(epoch)
            if (taken := self.grants.get(epoch)) is not None:
                self._forget_reports(taken)  # the receiver takes no report of an epoch that it drains
        return True

    def forget_below(self, floor: int) -> None:
        """The receiver has closed every epoch below ``floor``: it will not ask for reports on them."""
        if floor <= self.floor:
            return
        self.floor = floor
        for epoch in [epoch for epoch in self.grants if epoch < floor]:
            taken = self.grants[epoch]
            self.cancel(taken)
            self._forget_reports(taken)
            self.forget_if_over(taken)
        self.refused = {epoch for epoch in self.refused if epoch >= floor}

    def forget_if_over(self, taken: TakenGrant) -> None:
        """Forgets a grant that is closed, once no write under it is in flight."""
        if taken.epoch < self.floor and not taken.in_flight:
            del self.grants[taken.epoch]

    def _forget_reports(self, taken: TakenGrant) -> None:
        self.reports -= taken.reports
        taken.written.clear()
        taken.failed.clear()
