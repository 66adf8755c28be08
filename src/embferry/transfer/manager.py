"""The base of both managers: the lock, the turns of the driver, and the cost of a fault.

A manager drives records, one for each transfer. Its turns run on the driver thread, which nothing ends but
:meth:`Manager.close`. One lock guards the state machines. No callback, no sink and no other foreign code runs while it
is held, except for transports, which are behind :class:`~.guarded_transport.GuardedTransport`.
"""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError
from embferry.protocol.messages import VERSION, Body, Frame, decode, encode
from embferry.protocol.settings import TransferSettings
from embferry.transports.contract import Event, LinkLost, Transport

from .control.contract import ControlPlane, Unreachable
from .failures import as_transfer_error, attempt
from .guarded_transport import GuardedTransport
from .handle import Handle
from .ready_queue import ReadyQueue
from .runtime import Runtime

log = logging.getLogger(__name__)

IDLE = math.inf
REPORT_SECONDS = 1.0
"""Bad messages are logged once in this time at most."""


class Machine(Protocol):
    """A state machine, as far as every driver of one needs it."""

    def abort(self, error: EmbeddingTransferError, now: float) -> None: ...

    def expire(self, now: float) -> None: ...


class Record(Hashable, Protocol):
    """One transfer, as the driver sees it.

    Attributes:
        room: The ``bootstrap_room``.
        end: What the user holds.
        failure: The error of something around the machine that ended the transfer, or None.
        is_broken: Whether the machine has raised: a bug of ours. It is not called again.
    """

    room: int
    end: Handle
    failure: EmbeddingTransferError | None
    is_broken: bool

    def history(self) -> list[str]:
        """Returns the last events of the machine, a line each."""
        ...


R = TypeVar("R", bound=Record)


class Manager(ABC, Generic[R]):
    """Drives the transfers of one end.

    Args:
        runtime: Clock, control plane and threads. The manager stops it.
        transports: In order of preference. The manager closes them, also if it cannot be made.
        settings: Time-outs, retries and sizes.

    Attributes:
        rejected_messages: Control messages that could not be read.
    """

    def __init__(self, runtime: Runtime, transports: Sequence[Transport], settings: TransferSettings | None) -> None:
        self.settings = settings or TransferSettings()
        self.lock = threading.RLock()
        self.ready_queue: ReadyQueue[R] = ReadyQueue()
        self.transports = {transport.name: GuardedTransport(transport, runtime.wake) for transport in transports}
        self.rejected_messages = 0
        self._runtime = runtime
        self._outgoing: deque[tuple[Hashable, bytes]] = deque()  # any thread appends, the driver thread sends
        self._due = IDLE  # when the driver is due again, as far as it knows
        self._is_closed = False
        self._reported_at = -REPORT_SECONDS
        self._lost_transports: set[str] = set()

    # For users

    def now(self) -> float:
        """Returns the time of the state machines, in seconds."""
        return self._runtime.now()

    def wake(self) -> None:
        """Causes a turn of the driver. Any thread; never blocks."""
        self._runtime.wake()

    def run_callback(self, call: Callable[[], None]) -> None:
        """Runs a user's callback soon, on the callback thread, without locks."""
        self._runtime.run_callback(call)

    def check(self) -> None:
        """Checks that transfers can be made.

        Raises:
            LocalProtocolError: The manager is closed.
            TransportError: Every transport has failed.
        """
        if self._is_closed:
            raise LocalProtocolError("this manager is closed")
        lost = [transport.lost for transport in self.transports.values()]
        if lost and all(lost) and lost[0] is not None:
            raise lost[0]

    @property
    def control(self) -> ControlPlane:
        """The control plane, to read its counters; everything else of it belongs to the driver thread."""
        return self._runtime.control

    @property
    def fault(self) -> EmbeddingTransferError | None:
        """Why this manager can serve no transfer any more, although it is not closed; None: it can."""
        try:
            self.check()
        except EmbeddingTransferError as error:
            return None if self._is_closed else error
        return None

    def close(self) -> None:
        """Aborts open transfers and frees everything. No byte is read or written for them afterwards.

        Raises:
            LocalProtocolError: Called on the driver thread.
            ExceptionGroup: Something could not be closed; everything else is.
        """
        with self.lock:
            if self._is_closed:
                return
            self._is_closed = True
            for record in self._records():
                self._abort(record, self._shutting_down())
                self.ready_queue.touch(record)
        errors = self._collect(self._runtime.stop)
        for transport in self.transports.values():
            errors += self._collect(transport.close)
        with self.lock:
            self._take_transport_events()
            changed = [record for record in self._records() if self._finish(record)]
        for record in changed:
            record.end.notify()
        errors += self._collect(self._release)
        if errors:
            raise ExceptionGroup("a manager could not close everything", errors)

    # For subclasses

    @abstractmethod
    def _records(self) -> list[R]:
        """Returns all records. The lock is held."""

    @abstractmethod
    def _abort(self, record: R, error: EmbeddingTransferError) -> None:
        """Ends the machine of a record with ``error``, unless it has ended. The lock is held."""

    @abstractmethod
    def _advance(self, record: R, now: float) -> None:
        """Lets the machine act on what has happened and on the time, and executes its commands. The lock is held."""

    def _work(self, record: R, now: float) -> bool:
        """Does what foreign code is needed for. The lock is not held.

        Returns:
            Whether the machine may have something to do now.
        """
        return False

    @abstractmethod
    def _settle(self, record: R, now: float) -> None:
        """Forgets the record if it is over, otherwise sets its timer. The lock is held."""

    @abstractmethod
    def _tear_down(self, record: R, now: float) -> None:
        """Releases what a broken record holds, as far as that is safe by now. Called until it is gone. Lock held."""

    @abstractmethod
    def _finish(self, record: R) -> bool:
        """The manager has been closed: releases what the record holds. Returns whether to notify. The lock is held."""

    @abstractmethod
    def _take(self, peer: Hashable, frame: Frame, now: float) -> None:
        """Hands a control message to its record. The lock is held."""

    @abstractmethod
    def _unreachable(self, event: Unreachable, now: float) -> None:
        """A peer cannot be reached, or its connection has ended. The lock is held."""

    @abstractmethod
    def _transport_event(self, event: Event) -> None:
        """Handles an event of a transport. The lock is held."""

    @abstractmethod
    def _transport_lost(self, transport: GuardedTransport, now: float) -> None:
        """A transport has failed: tells the records. The lock is held."""

    @abstractmethod
    def _shutting_down(self) -> EmbeddingTransferError:
        """Returns the error of the transfers that :meth:`close` ends."""

    @abstractmethod
    def _release(self) -> None:
        """Frees what belongs to the manager itself. The transports are closed."""

    def _after_records(self, now: float) -> list[R]:
        """Runs at the end of a turn, with the lock held. Returns records that have something to do now."""
        return []

    # The driver thread

    def turn(self) -> float | None:
        """Handles everything that has happened and is due. Returns when it is due again; None: only after an event."""
        now = self.now()
        for event in self._runtime.control.poll():
            with self.lock:
                if isinstance(event, Unreachable):
                    self._unreachable(event, now)
                else:
                    self._take_in(event.peer, event.data, now)
        with self.lock:
            self._take_transport_events()
            ready = self.ready_queue.due(now)
        for record in ready:
            self.step(record, now)
        while more := self._after(now):
            for record in more:
                self.step(record, now)
        self._send_queued()
        with self.lock:
            due = self.ready_queue.next() if self.ready_queue.is_clear and not self._outgoing else now
            self._due = IDLE if due is None else due
            return due

    def _after(self, now: float) -> list[R]:
        with self.lock:
            return self._after_records(now)

    def step(self, record: R, now: float) -> None:
        """Advances one record. What it raises is its own failure."""
        with self.lock:
            self.guard(record, self._advance, record, now)
        worked = self._work(record, now)
        with self.lock:
            if worked:
                self.guard(record, self._advance, record, now)
            if record.is_broken:
                self._tear_down(record, now)
            else:
                self.guard(record, self._settle, record, now)
            changed = record.end.has_changed()
        if changed:
            record.end.notify()

    def guard(self, record: R, call: Callable[..., object], *arguments: object) -> None:
        """Calls what drives a machine. An exception is a bug of ours, and ends this transfer alone. Lock held."""
        if record.is_broken:
            return
        if (error := attempt(call, *arguments)) is not None:
            record.is_broken = True
            history = record.history()
            log.critical(
                "room %d: a bug in embferry has ended this transfer; please report it, with this: %r, history %s",
                *(record.room, error, "; ".join(history)),
                exc_info=error,
            )
            why = f"a bug in embferry has ended this transfer: {error!r}; the log has its traceback"
            record.failure = record.failure or LocalProtocolError(why, room=record.room)
            self.ready_queue.touch(record)
            self.wake()

    def fail(self, record: R, what: str, error: Exception) -> None:
        """Foreign code has raised: ends its transfer with an error that names the cause. Any thread."""
        cause = as_transfer_error(what, error, record.room)
        log.error("room %d: %s", record.room, cause, exc_info=None if cause is error else error)
        with self.lock:
            record.failure = record.failure or cause
            self.guard(record, self._abort, record, cause)
        self.touch(record)

    def touch(self, record: R) -> None:
        """Queues a record to be processed by the driver thread. Any thread."""
        with self.lock:
            self.ready_queue.touch(record)
        self.wake()

    def send(self, peer: Hashable, source: int, target: int, body: Body) -> None:
        """Queues a control message. A message that is lost is repeated by the machine that needs an answer."""
        self._outgoing.append((peer, encode(Frame(VERSION, source, target, body))))

    def schedule(self, record: R, time: float) -> None:
        """Sets the timer of a record. Wakes the driver only if it would sleep beyond it. Any thread; lock held."""
        self.ready_queue.schedule(record, time)
        if time < self._due:
            self.wake()

    def _send_queued(self) -> None:
        control = self._runtime.control
        while self._outgoing:
            peer, data = self._outgoing.popleft()
            if (error := attempt(control.send, peer, data)) is not None:
                self._report("a control message could not be sent to %r: %r", peer, error)
        if (error := attempt(control.flush)) is not None:
            self._report("control messages could not be sent: %r", error)

    def _take_in(self, peer: Hashable, data: bytes, now: float) -> None:
        try:
            frame = decode(data)
        except EmbeddingTransferError as error:
            self._report("dropped a control message from %r: %s", peer, error)
            return
        self._take(peer, frame, now)

    def _take_transport_events(self) -> None:
        for transport in self.transports.values():
            for event in transport.poll():
                if isinstance(event, LinkLost):
                    log.info("a data connection ended: %s", event.error)
                else:
                    self._transport_event(event)
            if transport.lost is not None and transport.name not in self._lost_transports and not self._is_closed:
                self._lost_transports.add(transport.name)
                self._transport_lost(transport, self.now())

    def _report(self, text: str, *values: object) -> None:
        """Logs something that a peer can cause as often as it likes."""
        self.rejected_messages += 1
        if self.now() - self._reported_at >= REPORT_SECONDS:
            self._reported_at = self.now()
            log.warning(text + " (%d such messages so far)", *values, self.rejected_messages)

    @staticmethod
    def _collect(close: Callable[[], None]) -> list[Exception]:
        if (error := attempt(close)) is None:
            return []
        log.error("something could not be closed", exc_info=error)
        return [error]
