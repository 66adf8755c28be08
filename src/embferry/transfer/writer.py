"""Executes the writes of all sender machines: over which transport, from where, with which checksum."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from embferry.memory.buffers import source_pieces
from embferry.protocol.commands import Write
from embferry.protocol.errors import TransportError
from embferry.protocol.layout import Layout
from embferry.protocol.messages import TransportAddress
from embferry.protocol.settings import TransferSettings
from embferry.transports.contract import LinkLost, Transport, Written

from .checksums import chunk_checksum
from .fields import Fields
from .send_handle import EmbeddingSender
from .staging import Allocate, Staged, Staging

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Writing:
    """A write in flight.

    Attributes:
        slot: The staging buffer that it reads from, if any.
    """

    sender: EmbeddingSender
    command: Write
    checksum: bytes | None
    slot: int | None


class Writer:
    """All writes of one manager. The manager's lock is held during every call.

    Args:
        layout: The fields of a token.
        transports: The transports to write over.
        settings: Sizes of chunks, and how many are written at once.
        wake: Called by transports, from any thread, when :meth:`advance` has something to do. Must not block.
        allocate: Makes the host buffers for embeddings in device memory, when the first such embedding is sent.

    Attributes:
        addresses: The address of this end on every transport.
    """

    def __init__(
        self,
        layout: Layout,
        transports: Sequence[Transport],
        settings: TransferSettings,
        wake: Callable[[], None],
        allocate: Allocate,
    ) -> None:
        self.layout, self.settings = layout, settings
        self.transports = {transport.name: transport for transport in transports}
        for transport in transports:
            transport.wake = wake
        self.addresses = tuple(TransportAddress(transport.name, transport.address) for transport in transports)
        self._wake, self._allocate = wake, allocate
        self._staging: Staging[tuple[EmbeddingSender, Write]] | None = None
        self._writing: dict[int, _Writing] = {}
        self._next_ticket = 1

    def connect(self, sender: EmbeddingSender, target: int, transport: TransportAddress) -> None:
        """Connects before the first write, which then does not wait for it."""
        try:
            self.transports[transport.name].connect(transport.handle)
        except TransportError as error:
            log.info("room %d: cannot connect over %s: %s", sender.room, transport.name, error)
            if not error.retryable:
                sender.machine.transport_failed(target, transport.name)

    def write(self, sender: EmbeddingSender, command: Write) -> None:
        """Starts a write, or the copy from device memory that must precede it."""
        rows = {name: rows for name, rows in sender.source.items() if isinstance(rows, np.ndarray)}
        if len(rows) == len(sender.source):
            self._start(sender, command, rows, command.offset, None)
            return
        if self._staging is None:
            chunk, slots = self.settings.chunk_bytes, self.settings.writes_in_flight
            self._staging = Staging(
                self.layout, chunk_bytes=chunk, slots=slots, wake=self._wake, allocate=self._allocate
            )
        self._staging.submit((sender, command), sender.source, command.offset, command.offset + command.length)

    def advance(self) -> set[EmbeddingSender]:
        """Handles completed writes and completed copies from device memory. Returns the senders concerned."""
        changed = set()
        for transport in self.transports.values():
            for event in transport.poll():
                if isinstance(event, LinkLost):
                    log.info("a data connection ended: %s", event.error)
                elif isinstance(event, Written):
                    changed.add(self._completed(event))
        for staged in self._staging.finished() if self._staging else ():
            changed.add(staged.key[0])
            self._staged(staged)
        return changed

    def close(self) -> None:
        """Closes the transports. :meth:`advance` then handles the last events."""
        with ExitStack() as closing:  # each is closed, even if another one raises
            for transport in self.transports.values():
                closing.callback(transport.close)
            if self._staging:
                closing.callback(self._staging.close)

    def _staged(self, staged: Staged[tuple[EmbeddingSender, Write]]) -> None:
        sender, c = staged.key
        if staged.error is None:
            self._start(sender, c, staged.rows, 0, staged.slot)
            return
        staged.error.room = sender.room
        sender.abort(staged.error)
        sender.machine.write_failed(c.target, c.epoch, c.offset, c.length, staged.error)
        self._release(staged.slot)

    def _start(self, sender: EmbeddingSender, c: Write, rows: Fields, at: int, slot: int | None) -> None:
        """Starts a write of the tokens from row ``at`` of ``rows`` on."""
        geometry, transport = sender.machine.destinations[c.target].opened.geometry, self.transports[c.transport.name]
        pieces = source_pieces(geometry, rows, at, c.length, c.blocks, 0)
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        try:
            transport.connect(c.transport.handle)
        except TransportError as error:
            sender.machine.write_failed(c.target, c.epoch, c.offset, c.length, error)
            self._release(slot)
            return
        transport.write(c.transport.handle, c.epoch, c.blocks, pieces, ticket)
        checksum = self._checksum(sender, c, rows, at) if c.checksum else None  # the transport writes meanwhile
        self._writing[ticket] = _Writing(sender, c, checksum, slot)
        sender.sent_bytes += c.length * self.layout.token_bytes

    def _checksum(self, sender: EmbeddingSender, c: Write, rows: Fields, at: int) -> bytes:
        known = sender.checksums.of(c.offset, c.length) if sender.checksums else None
        return known or chunk_checksum(self.layout, rows, at, c.length)

    def _completed(self, event: Written) -> EmbeddingSender:
        writing = self._writing.pop(event.ticket)
        c, machine = writing.command, writing.sender.machine
        self._release(writing.slot)
        if event.error is None:
            machine.write_done(c.target, c.epoch, c.offset, c.length, writing.checksum)
        else:
            stop = c.offset + c.length
            log.warning("room %d: tokens [%d, %d) not written: %s", machine.room, c.offset, stop, event.error)
            machine.write_failed(c.target, c.epoch, c.offset, c.length, event.error)
        return writing.sender

    def _release(self, slot: int | None) -> None:
        if slot is not None and self._staging is not None:
            self._staging.release(slot)
