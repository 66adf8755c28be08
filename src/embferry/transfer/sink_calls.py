"""Calls of sinks: the one place where received data meets code of users."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.commands import Deliver, Restart, Verify

from .failures import attempt
from .receive_record import Granted, ReceiveRecord, SinkCall

log = logging.getLogger(__name__)

PASSES_A_TURN, MAX_PASSES = 4, 1 << 20
"""Steps of a verification before the next transfer's turn: 4 MiB, or the whole chunk if there is no other transfer."""


_METHODS = {Granted: "granted", Verify: "verify", Deliver: "deliver", Restart: "restart"}


class Host(Protocol):
    """The manager, as far as the calls of its sinks need it."""

    buffers: MultimodalDataBuffers

    @property
    def lock(self) -> AbstractContextManager[object]: ...

    def guard(self, record: ReceiveRecord, call: Callable[..., object], *arguments: object) -> None: ...

    def fail(self, record: ReceiveRecord, what: str, error: Exception) -> None: ...

    def touch(self, record: ReceiveRecord) -> None: ...

    def run_commands(self, record: ReceiveRecord, now: float) -> None: ...

    def consumed(self, record: ReceiveRecord, epoch: int, offset: int) -> None: ...

    def run_callback(self, call: Callable[[], None]) -> None: ...


class SinkCalls:
    """Makes the calls that a record has queued. For the driver thread; the manager's lock is not held."""

    def __init__(self, manager: Host) -> None:
        self._manager = manager
        self._passes = 0  # left in this turn

    def make(self, record: ReceiveRecord, now: float, *, alone: bool) -> None:
        """Makes calls until none is left or it is another transfer's turn.

        Args:
            record: The transfer.
            now: Seconds.
            alone: Whether there is no other transfer.
        """
        self._passes = MAX_PASSES if alone else PASSES_A_TURN
        while record.calls and self._passes > 0 and not record.is_preparing and not record.is_broken:
            call = record.calls[0]
            if record.discards:
                self._discard(record, call, now)
            elif (error := attempt(self._make, record, call, now)) is not None:
                self._manager.fail(record, f"the sink's {_METHODS[type(call)]}()", error)
        if not (record.is_preparing or record.discards or record.is_broken):
            self._ask(record)

    def _ask(self, record: ReceiveRecord) -> None:
        """Asks the sink whether everything is where it belongs."""
        error = attempt(self._ask_sink, record)
        if error is not None:
            self._manager.fail(record, "the sink's is_complete", error)

    @staticmethod
    def _ask_sink(record: ReceiveRecord) -> None:
        with record.sink_lock:
            record.is_sink_complete = bool(record.sink.is_complete)

    def _make(self, record: ReceiveRecord, call: SinkCall, now: float) -> None:
        """Makes a call, or a part of it."""
        total = self._total(record)
        match call:
            case Verify():
                if record.verification is None and self._needs_preparation(record, call):
                    self._prepare(record, call, total)
                else:
                    self._verify(record, call, total, now)
                return
            case Deliver():
                if call.offset == 0:
                    self._write_aux(record, call)
                with record.sink_lock:
                    record.is_sink_complete = False  # until it is asked, when the calls have been made
                    record.sink.deliver(call, total)
            case Restart():
                with record.sink_lock:
                    record.sink.restart()
            case Granted(epoch, start, blocks):
                with record.sink_lock:
                    record.sink.granted(epoch, start, blocks)
        self._done(record)

    @staticmethod
    def _needs_preparation(record: ReceiveRecord, check: Verify) -> bool:
        with record.sink_lock:
            return record.sink.needs_preparation(check)

    def _verify(self, record: ReceiveRecord, check: Verify, total: int, now: float) -> None:
        with record.sink_lock:
            if record.verification is None:
                record.verification = record.sink.verify(check, total)
            matches = self._compare(record.verification)
        if matches is not None:
            self._verified(record, check, now, matches=matches)

    def _compare(self, verification: Generator[None, None, bool]) -> bool | None:
        """Goes on with a verification. Returns its result, or None if this turn has no passes left."""
        while self._passes > 0:
            self._passes -= 1
            try:
                next(verification)
            except StopIteration as end:
                return bool(end.value)
        return None

    def _verified(self, record: ReceiveRecord, check: Verify, now: float, *, matches: bool) -> None:
        machine = record.machine
        assert machine is not None  # it has asked for the verification
        record.verification = None
        record.verified_tokens += check.length
        with self._manager.lock:
            verified = partial(machine.verified_chunk, matches=matches, now=now)
            self._manager.guard(record, verified, check.epoch, check.offset)
            self._manager.guard(record, self._manager.run_commands, record, now)
        self._done(record)

    def _discard(self, record: ReceiveRecord, call: SinkCall, now: float) -> None:
        """The transfer has failed: releases the blocks that a call would have read."""
        match call:
            case Verify():
                self._verified(record, call, now, matches=False)
            case Deliver(epoch, offset):
                with self._manager.lock:
                    record.discard(call)
                self._manager.consumed(record, epoch, offset)
                self._done(record)
            case Restart():
                record.calls.popleft()  # not counted as made: the sink still has what was replaced, so nothing is used
            case _:
                self._done(record)

    def _done(self, record: ReceiveRecord) -> None:
        with self._manager.lock:
            if record.calls and isinstance(record.calls.popleft(), Restart):
                record.restarts -= 1

    def _prepare(self, record: ReceiveRecord, check: Verify, total: int) -> None:
        """Prepares the sink on the callback thread, where it may take its time."""

        def place() -> None:
            with record.sink_lock:
                record.sink.prepare(check, total)

        def prepare() -> None:
            error = attempt(place)
            if error is not None:
                self._manager.fail(record, "the sink's prepare()", error)
            record.is_preparing = False
            self._manager.touch(record)

        record.is_preparing = True
        if (error := attempt(self._manager.run_callback, prepare)) is not None:
            record.is_preparing = False
            raise error

    def _write_aux(self, record: ReceiveRecord, chunk: Deliver) -> None:
        machine = record.machine
        assert machine is not None
        self._manager.buffers.write_aux(chunk.blocks[0], machine.total_tokens, machine.aux)

    @staticmethod
    def _total(record: ReceiveRecord) -> int:
        assert record.machine is not None
        return record.machine.total_tokens
