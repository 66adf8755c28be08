"""Executes the writes of all sender machines: over which transport, from where, with which checksum.

A write ends when the transport has written its bytes and its checksum has been taken. The checksum of a small chunk is
taken when the write starts. That of a large one takes a millisecond or more, so the driver takes it in steps, without
the manager's lock, and other transfers have their turns in between.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import numpy as np

from embferry.memory.buffers import source_pieces
from embferry.protocol.commands import Write
from embferry.protocol.errors import EmbeddingTransferError, TransportError
from embferry.protocol.layout import Layout
from embferry.protocol.messages import TransportAddress
from embferry.protocol.settings import TransferSettings
from embferry.transports.contract import Written

from .checksums import checksum_steps, chunk_checksum
from .failures import P, as_transfer_error, attempt
from .fields import Fields
from .guarded_transport import GuardedTransport
from .send_record import SendRecord
from .staging import Allocate, Staged, Staging

log = logging.getLogger(__name__)

AT_ONCE_BYTES = 1 << 20
"""The checksum of a chunk up to this size is taken when its write starts: 0.1 ms."""

Ended = Callable[[SendRecord, Write, bytes | None, EmbeddingTransferError | None], None]
"""A write has ended, with its checksum or its error. The manager's lock is held."""


@dataclass(slots=True)
class InFlightWrite:
    """A write that has not ended.

    Attributes:
        steps: What is left of taking its checksum, if that takes several steps.
        is_written: Whether the transport has ended it.
        transport_error: Why the transport could not write it.
        slot: The staging buffer that it reads from, if any.
        error: Why it counts as failed although its bytes may arrive.
    """

    record: SendRecord
    command: Write
    checksum: bytes | None = None
    steps: Generator[None, None, bytes] | None = None
    is_written: bool = False
    transport_error: TransportError | None = None
    slot: int | None = None
    error: EmbeddingTransferError | None = None

    def advance_checksum(self, passes: int) -> None:
        """Goes on with the checksum, for so many steps. For the driver thread; the manager's lock is not held.

        Raises:
            Exception: The embedding cannot be read.
        """
        assert self.steps is not None  # otherwise nothing is left of it
        for _ in range(passes):
            try:
                next(self.steps)
            except StopIteration as end:
                self.checksum = end.value
                return


class Writer:
    """All writes of one manager. The manager's lock is held during every call but :meth:`close`.

    Args:
        layout: The fields of a token.
        transports: The transports to write over.
        settings: Sizes of chunks, and how many are written at once.
        wake: Called, on any thread, when :meth:`staged` has something to do.
        allocate: Makes the host buffers for embeddings in device memory, when the first such embedding is sent.
        checksum_due: Called when :meth:`has_checksums` becomes true for a record.
        ended: Called for every write exactly once.
    """

    def __init__(
        self,
        layout: Layout,
        transports: Mapping[str, GuardedTransport],
        settings: TransferSettings,
        wake: Callable[[], None],
        allocate: Allocate,
        checksum_due: Callable[[SendRecord], None],
        ended: Ended,
    ) -> None:
        self.layout, self.settings, self.transports = layout, settings, transports
        self._wake, self._allocate, self._checksum_due, self._ended = wake, allocate, checksum_due, ended
        self._staging: Staging[tuple[SendRecord, Write]] | None = None
        self._writing: dict[int, InFlightWrite] = {}
        self._checksums_due: dict[SendRecord, deque[InFlightWrite]] = {}  # those whose checksums are still to be taken
        self._next_ticket = 1

    def connect(self, transport: TransportAddress) -> TransportError | None:
        """Connects before the first write, which then does not wait for it. Returns the error, if any."""
        try:
            self.transports[transport.name].connect(transport.handle)
        except TransportError as error:
            return error.with_traceback(None)  # its frames refer to embeddings
        return None

    def write(self, record: SendRecord, command: Write) -> None:
        """Starts a write, or the copy from device memory that must precede it. ``ended`` follows."""
        record.writes += 1
        writing = InFlightWrite(record, command)
        if not self._attempt(writing, self._begin, writing):
            self._finish(writing, None)

    def advance(self) -> None:
        """Starts the writes of chunks that have been copied from device memory."""
        for staged in self._staging.finished() if self._staging else ():
            self._staged(staged)

    def written(self, event: Written) -> None:
        """A transport has ended a write."""
        writing = self._writing.pop(event.ticket)
        writing.is_written, writing.transport_error = True, event.error
        if writing.steps is None:
            self._finish(writing, event.error)

    def has_checksums(self, record: SendRecord) -> bool:
        """Returns whether checksums of writes of the record are still to be taken."""
        return record in self._checksums_due

    def next_checksum(self, record: SendRecord) -> InFlightWrite | None:
        """Returns the write whose checksum is to be taken next. Drops those that have failed, which need none."""
        while (writing := self._first(record)) is not None:
            if record.error is None and writing.transport_error is None:
                return writing
            writing.error = writing.error or record.error
            self._forget_checksum(writing)
        return None

    def checksum_taken(self, writing: InFlightWrite, error: Exception | None) -> None:
        """Taking a checksum has ended, with ``error`` if the embedding cannot be read."""
        if error is not None:
            self._source_failed(writing, error)
        self._forget_checksum(writing)

    def close(self) -> None:
        """Ends the staging thread. The transports are closed; :meth:`advance` then handles the last copies."""
        if self._staging:
            self._staging.close()

    def _staging_buffers(self) -> Staging[tuple[SendRecord, Write]]:
        if self._staging is None:
            self._staging = Staging(
                self.layout,
                chunk_bytes=self.settings.chunk_bytes,
                slots=self.settings.writes_in_flight,
                wake=self._wake,
                allocate=self._allocate,
            )
        return self._staging

    def _staged(self, staged: Staged[tuple[SendRecord, Write]]) -> None:
        record, command = staged.key
        writing = InFlightWrite(record, command, slot=staged.slot)
        if staged.error is not None:
            self._source_failed(writing, staged.error)
            self._finish(writing, None)
        elif not self._attempt(writing, self._start, writing, staged.rows, 0):
            self._finish(writing, None)

    def _begin(self, writing: InFlightWrite) -> None:
        record, c = writing.record, writing.command
        rows = {name: rows for name, rows in record.source.items() if isinstance(rows, np.ndarray)}
        if len(rows) == len(record.source):
            self._start(writing, rows, c.offset)
        else:
            self._staging_buffers().submit((record, c), record.source, c.offset, c.offset + c.length)

    def _start(self, writing: InFlightWrite, rows: Fields, at: int) -> None:
        """Starts a write of the tokens from row ``at`` of ``rows`` on."""
        record, c = writing.record, writing.command
        geometry, transport = record.machine.destinations[c.target].opened.geometry, self.transports[c.transport.name]
        pieces = source_pieces(geometry, rows, at, c.length, c.blocks, 0)
        error = self.connect(c.transport)
        if error is not None:
            self._finish(writing, error)
            return
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._writing[ticket] = writing
        transport.write(c.transport.handle, c.epoch, c.blocks, pieces, ticket)
        record.sent_bytes += c.length * self.layout.token_bytes
        # the transport writes meanwhile
        if c.checksum:
            self._attempt(writing, self._begin_checksum, writing, rows, at)

    def _begin_checksum(self, writing: InFlightWrite, rows: Fields, at: int) -> None:
        """Takes the checksum of a small chunk, or one taken in advance. That of a large chunk is left to the driver."""
        record, c = writing.record, writing.command
        writing.checksum = record.checksums.of(c.offset, c.length) if record.checksums else None
        if writing.checksum is not None:
            return
        if c.length * self.layout.token_bytes <= AT_ONCE_BYTES:
            writing.checksum = chunk_checksum(self.layout, rows, at, c.length)
        else:
            writing.steps = checksum_steps(self.layout, rows, at, c.length)
            self._checksums_due.setdefault(record, deque()).append(writing)
            self._checksum_due(record)

    def _first(self, record: SendRecord) -> InFlightWrite | None:
        """Returns the oldest write of the record whose checksum is still to be taken."""
        return self._checksums_due[record][0] if record in self._checksums_due else None

    def _forget_checksum(self, writing: InFlightWrite) -> None:
        """Nothing is left of taking a checksum. The write ends if the transport has ended it."""
        record, writing.steps = writing.record, None
        due = self._checksums_due[record]
        due.popleft()  # checksums are taken in the order of the writes
        if not due:
            del self._checksums_due[record]
        if writing.is_written:
            self._finish(writing, writing.transport_error)

    def _finish(self, writing: InFlightWrite, error: TransportError | None) -> None:
        record, c = writing.record, writing.command
        record.writes -= 1
        if writing.slot is not None and self._staging is not None:
            self._staging.release(writing.slot)
        if error is not None:
            stop = c.offset + c.length
            text, extra = "room %d: tokens [%d, %d) not written: %s", {"room": record.room}
            log.warning(text, record.room, c.offset, stop, error, extra=extra)
        self._ended(record, c, writing.checksum, writing.error or error)

    def _attempt(
        self, writing: InFlightWrite, call: Callable[P, object], *arguments: P.args, **keywords: P.kwargs
    ) -> bool:
        """Makes a call that reads the embedding. Returns False if that failed."""
        error = attempt(call, *arguments, **keywords)
        if error is None:
            return True
        self._source_failed(writing, error)
        del error  # its traceback refers to this frame, and to others that refer to the embedding
        return False

    @staticmethod
    def _source_failed(writing: InFlightWrite, error: Exception) -> None:
        """The embedding cannot be read, which ends the transfer: trying again would not help."""
        record = writing.record
        extra = {"room": record.room}
        log.error("room %d: the embedding cannot be sent", record.room, exc_info=error, extra=extra)
        cause = as_transfer_error("reading the embedding", error, record.room)
        cause.retryable = False
        record.failure = record.failure or cause
        writing.error = cause
