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
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, shown
from embferry.protocol.messages import Abort, Body, Closed, Frame, Open, Unknown, decode
from embferry.protocol.settings import TransferSettings
from embferry.transports.contract import Event, LinkLost, Transport

from .control.contract import ControlPlane, Received, Unreachable
from .control_messages import ControlMessages
from .failures import as_transfer_error, attempt, error_of_bug
from .guarded_transport import GuardedTransport
from .ready_queue import ReadyQueue
from .record import Record
from .runtime import Runtime

log = logging.getLogger(__name__)

IDLE = math.inf
REPORT_SECONDS = 1.0
"""Bad messages are logged once in this time at most."""

AGAIN_SECONDS = 0.1
"""When a part of a turn that has failed is tried again."""

SENT_TOGETHER = 16
"""Transfers that are advanced before their messages are sent. The peer works on them while the next are advanced."""

R = TypeVar("R", bound=Record)


class Manager(ABC, Generic[R]):
    """Drives the transfers of one end.

    Args:
        make_runtime: Makes clock, control plane and threads. The manager stops them.
        transports: In order of preference. The manager closes them, also if it cannot be made.
        settings: Time-outs, retries and sizes.
    """

    def __init__(
        self, make_runtime: Callable[[], Runtime], transports: Sequence[Transport], settings: TransferSettings | None
    ) -> None:
        self.settings = settings or TransferSettings()
        self.lock = threading.RLock()
        self.ready_queue: ReadyQueue[R] = ReadyQueue()
        self._due = IDLE  # when the driver is due again, as far as it knows
        self._is_closed = False
        self._failed_at = -REPORT_SECONDS
        self._again_at = IDLE  # when a part of a turn that failed is tried again
        self._forgotten: list[R] = []  # in this turn
        self._lost_transports: set[str] = set()
        try:
            names = [transport.name for transport in transports]
            if len(set(names)) != len(names):
                raise LocalProtocolError(f"one transport of each kind, not {names}")
            self._runtime = make_runtime()
            self._messages = ControlMessages(self._runtime.control, self.now)
        except BaseException:
            for transport in transports:
                self._collect(transport.close)
            raise
        self.transports = {transport.name: GuardedTransport(transport, self._on_events) for transport in transports}

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
            raise lost[0].copied()

    @property
    def rejected_messages(self) -> int:
        """Control messages that could not be read or sent."""
        return self._messages.rejected

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
            LocalProtocolError: Called on the driver thread; nothing is closed.
            ExceptionGroup: Something could not be closed; everything else is.
        """
        if self._runtime.is_own_thread:
            raise LocalProtocolError("a manager cannot be closed on its own thread, by a sink; close it elsewhere")
        with self.lock:
            if self._is_closed:
                return
            self._is_closed = True
            for record in self._records():
                self.guard(record, self._abort, record, self._shutting_down())
                self.ready_queue.touch(record)
        errors = self._collect(self._runtime.stop)
        for transport in self.transports.values():
            errors += self._collect(transport.close)
        with self.lock:
            self._take_transport_events()
            for record in self._records():
                self._finish(record)
        errors += self._collect(self._release)
        with self.lock:
            changed = [record for record in self._records() if record.end.has_changed()]
        for record in changed:
            record.end.notify()
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

    def _has_work(self, record: R) -> bool:
        """Returns whether :meth:`_work` has something to do. The lock is held."""
        return False

    def _work(self, record: R, now: float) -> None:
        """Does what foreign code is needed for; then the machine may have something to do. The lock is not held."""

    @abstractmethod
    def _settle(self, record: R, now: float) -> None:
        """Forgets the record if it is over, otherwise sets its timer. The lock is held."""

    @abstractmethod
    def _tear_down(self, record: R, now: float) -> None:
        """Releases what a broken record holds, as far as that is safe by now. Called until it is gone. Lock held."""

    @abstractmethod
    def _finish(self, record: R) -> None:
        """The manager has been closed: releases what the record holds. The lock is held."""

    @abstractmethod
    def _take(self, peer: Hashable, frame: Frame, now: float) -> bool:
        """Hands a control message to its record. The lock is held.

        Returns:
            Whether a transfer of this manager has ``peer`` for its other end.
        """

    @abstractmethod
    def _unreachable(self, event: Unreachable, now: float) -> None:
        """A peer cannot be reached, or its connection has ended. The lock is held."""

    def _on_events(self) -> None:
        """A transport has events. Any thread."""
        self.wake()

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

    def _serve_waiting(self, now: float) -> list[R]:
        """Gives records what they wait for. Returns those that have something to do now. The lock is held."""
        return []

    # The driver thread

    def forget(self, record: R) -> None:
        """A record is over, and no longer among :meth:`_records`. The lock is held."""
        self.ready_queue.forget(record)
        self._forgotten.append(record)

    def turn(self) -> float | None:
        """Handles everything that has happened and is due. Returns when it is due again; None: only after an event."""
        now, self._again_at = self.now(), IDLE
        events: list[Received | Unreachable] = []
        self._survive("reading control messages", lambda: events.extend(self._runtime.control.poll()))
        with self.lock:
            for event in events:
                self._survive("a control message", self._take_control_event, event, now)
            self._survive("the events of the transports", self._take_transport_events)
            for record in self._serve(now) if events else ():  # so that none is advanced twice
                self.ready_queue.touch(record)
            ready = self.ready_queue.due(now)
        self._step_all(ready, now)
        while more := self._serve(now):
            self._step_all(more, now)
        self._messages.send()
        with self.lock:
            while self._forgotten:
                self._forgotten.pop().let_go()
            timer = self._next_due()
            due = min(IDLE if timer is None else timer, self._again_at)
            self._due = due if self.ready_queue.is_clear and not self._messages.is_queued else now
            return None if self._due == IDLE else self._due

    def _step_all(self, records: list[R], now: float) -> None:
        for number, record in enumerate(records, 1):
            self._survive("a transfer", self.step, record, now)
            if number % SENT_TOGETHER == 0:
                self._messages.send()

    def _next_due(self) -> float | None:
        """Returns when something is due without an event, or None. The lock is held."""
        return self.ready_queue.next()

    def _serve(self, now: float) -> list[R]:
        records: list[R] = []
        with self.lock:
            self._survive("serving transfers that wait", lambda: records.extend(self._serve_waiting(now)))
        return records

    def _survive(self, what: str, call: Callable[..., object], *arguments: object) -> None:
        """Makes a call that concerns no single transfer. If it raises, the other parts of the turn go on."""
        if (error := attempt(call, *arguments)) is None:
            return
        self._again_at = self.now() + AGAIN_SECONDS
        if self.now() - self._failed_at >= REPORT_SECONDS:
            self._failed_at = self.now()
            log.critical("%s failed; transfers go on: %s", what, shown(error), exc_info=error)

    def step(self, record: R, now: float) -> None:
        """Advances one record. What it raises is its own failure."""
        with self.lock:
            self.guard(record, self._advance, record, now)
            has_work = self._has_work(record)
            changed = not has_work and self._end_step(record, now)
        if has_work:
            error = attempt(self._work, record, now)
            with self.lock:
                if error is not None:
                    self._broke(record, error)
                self.guard(record, self._advance, record, now)
                if not self._has_work(record):
                    self.ready_queue.untouch(record)  # what the work has caused has just been handled
                changed = self._end_step(record, now)
        if changed:
            record.end.notify()

    def _end_step(self, record: R, now: float) -> bool:
        """Returns whether the state of the record has changed, which is to be reported. The lock is held."""
        self.guard(record, self._settle, record, now)
        if record.is_broken:
            self._tear_down(record, now)
        return record.end.has_changed()

    def guard(self, record: R, call: Callable[..., object], *arguments: object) -> None:
        """Calls what drives a machine. An exception is a bug of ours, and ends this transfer alone. Lock held."""
        if record.is_broken:
            return
        if (error := attempt(call, *arguments)) is not None:
            self._broke(record, error)

    def _broke(self, record: R, error: Exception) -> None:
        record.is_broken = True
        record.failure = record.failure or error_of_bug(error, record.room, record.history())
        self.ready_queue.touch(record)
        self.wake()

    def refuse(self, record: R, peer: Hashable, session: int, frame: Frame) -> None:
        """Sends the error of a broken record to the peer that has a message for it. The lock is held.

        An end is never answered with an end: two broken records would not stop.
        """
        if record.failure is not None and frame.source and not isinstance(frame.body, Abort | Closed | Unknown):
            generation = frame.body.generation if isinstance(frame.body, Open) else 0
            self.send(peer, session, frame.source, Abort.because_of(record.failure, record.room, generation))

    def lingers(self, record: R, now: float) -> bool:
        """Returns whether a broken record is still kept, to tell its peer, and sets its timer. The lock is held."""
        record.kept_until = record.kept_until or now + self.settings.linger
        if now < record.kept_until and not self._is_closed:
            self.ready_queue.schedule(record, record.kept_until)
            return True
        return False

    def fail(self, record: R, what: str, error: Exception) -> None:
        """Foreign code has raised: ends its transfer with an error that names the cause. Any thread."""
        cause = as_transfer_error(what, error, record.room)
        trace, room = None if cause is error else error, record.room
        log.error("room %d: %s", room, cause, exc_info=trace, extra={"room": room})
        with self.lock:
            record.failure = record.failure or cause
            self.guard(record, self._abort, record, cause)
        self.touch(record)

    def touch(self, record: R) -> None:
        """Queues a record to be processed by the driver thread. Any thread."""
        with self.lock:
            self.ready_queue.touch(record)
        if not self._runtime.is_own_thread:  # otherwise the turn that is being made is followed by another
            self.wake()

    def send(self, peer: Hashable, source: int, target: int, body: Body) -> None:
        """Queues a control message. A message that is lost is repeated by the machine that needs an answer."""
        self._messages.queue(peer, source, target, body)

    def schedule(self, record: R, time: float) -> None:
        """Sets the timer of a record, and wakes the driver if it would sleep beyond it. Any thread; lock held."""
        self.ready_queue.schedule(record, time)
        if time < self._due:
            self.wake()

    def _take_control_event(self, event: Received | Unreachable, now: float) -> None:
        if isinstance(event, Unreachable):
            self._unreachable(event, now)
            return
        try:
            frame = decode(event.data)
        except EmbeddingTransferError as error:
            self._messages.report("dropped a control message from %r: %s", event.peer, error)
            return
        if self._take(event.peer, frame, now):
            self._runtime.control.serves(event.peer)

    def _take_transport_events(self) -> None:
        for transport in self.transports.values():
            events = transport.poll()
            if transport.lost is not None and transport.name not in self._lost_transports and not self._is_closed:
                self._lost_transports.add(transport.name)
                self._transport_lost(transport, self.now())  # first: then its failed writes are known to be its fault
            for event in events:
                if isinstance(event, LinkLost):
                    log.info("a data connection ended: %s", event.error)
                else:
                    self._transport_event(event)
        for name in () if self._is_closed else self._lost_transports:
            self._again_at = min(self._again_at, self.transports[name].close_when_due(self.now()))

    @staticmethod
    def _collect(close: Callable[[], None]) -> list[Exception]:
        if (error := attempt(close)) is None:
            return []
        log.error("something could not be closed", exc_info=error)
        return [error]
