"""The sending side of one link: asks for a lease for each write, has it written, says when it is done."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from embferry.protocol.errors import TransportError, TransportStalled
from embferry.trust.greeting import Greeting

from ..contract import Piece, Written
from ..net.connector import Connector
from ..net.link import OnEnd, SocketLink, refused
from ..net.loop import Scope
from ..net.stalls import progress_interval
from ..outbox import Outbox
from ..windows import Ranges
from . import messages as m
from .channel import Channel
from .engine_thread import EngineThread, WriteEngine
from .jobs import WriteJob, merged_runs
from .messages import FrameError

MAX_ASKED = 64  # writes that the receiver knows of; others wait here
MAX_UNSENT = MAX_ASKED * m.MAX_FRAME
END_MARGIN_S = 10.0


class _LeasedWrite(WriteJob):
    """A write as its link knows it. ``asked``: the receiver knows of it; ``over``: it awaits an acknowledgement."""

    def __init__(self, serial: int, epoch: int, ranges: Ranges, pieces: tuple[Piece, ...], ticket: int) -> None:
        super().__init__(partial(merged_runs, pieces))
        self.serial, self.ticket = serial, ticket
        self.ask = m.Ask(serial, epoch, m.pack_ranges(ranges))
        self.asked = self.over = False


class SendingEnd(SocketLink):
    """Writes to the receiver behind ``handle``, with an engine of its own, so that ending the link ends its writes.

    All but the constructor, ``write``, ``end`` and ``join`` is for the loop's thread.

    Args:
        address: IP address and port of the side channel.
        open_engine: Makes the engine; runs on the engine's thread.
        greet: Makes the greeting of the side channel.
        transport: The name of the transport, for that of the thread.
        acknowledged: The receiver answers "done", and a write is reported only then. So a receiver that is told of the
            report, on any transport, finds that the lease has ended.
        connect_timeout_s: How long the receiver may take to answer a connection.
        stall_timeout_s: The link is lost when a write is open, and for this time nothing has come from the receiver,
            which is asked for a sign of life every second.

    Raises:
        TransportError: The connection is refused at once.
    """

    def __init__(
        self,
        address: tuple[str, int],
        hello: m.Hello,
        open_engine: Callable[[], WriteEngine],
        loop: Scope,
        outbox: Outbox,
        on_end: OnEnd,
        greet: Callable[[], Greeting],
        *,
        transport: str,
        acknowledged: bool,
        connect_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        super().__init__(loop, outbox, on_end)
        self._stall_timeout_s = stall_timeout_s
        self._heard_at = self._next_check = 0.0
        self._is_checking = False  # guarded by the lock
        self._hello, self._acknowledged, self._connect_timeout_s = hello, acknowledged, connect_timeout_s
        # Guarded by the lock, up to _lost.
        self._jobs: dict[int, _LeasedWrite] = {}
        self._unasked: deque[_LeasedWrite] = deque()
        self._asked = self._serial = 0
        self._ready = False
        self._lost = False
        self._finished = threading.Event()
        self._channel: Channel | None = None
        self._base = 0
        self._welcomed = self._hung_up = self._awaits_hang_up = False
        self._connector = Connector(address, self.scope, connect_timeout_s, self._on_connected, self._on_refused, greet)
        self._thread = EngineThread(
            f"embferry-{transport}-engine",
            open_engine,
            on_ready=self._on_ready,
            on_over=self._on_over,
            on_end=lambda error, clean: self.scope.call(partial(self._on_engine_end, error, clean)),
        )
        self._connector.start()
        self.scope.call(lambda: self.scope.later(connect_timeout_s, self._check_welcome))
        self._thread.start()  # after that, so that its end comes after it too

    # From any thread

    def _enter(self, epoch: int, ranges: Ranges, pieces: Sequence[Piece], ticket: int) -> Callable[[], None]:
        job = _LeasedWrite(self._serial, epoch, ranges, tuple(pieces), ticket)
        self._serial += 1
        self._jobs[job.serial] = job
        self._unasked.append(job)
        starts_check, self._is_checking = not self._is_checking, True
        return partial(self._begin, job, starts_check)

    def _begin(self, job: _LeasedWrite, starts_check: bool) -> None:
        self._ask()  # first: a thread of this process that is woken can hold this one up
        self._thread.put(job)
        if starts_check:
            self.scope.call(self._start_check)

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends every write in flight with ``error``, and the link. ``lost``: this side did not want it."""
        with self._lock:
            if self._error is not None:
                return
            self._error, self._lost = error, lost
        self._thread.stop()

    def join(self, deadline: float | None) -> None:
        """Waits for the engine, until ``deadline`` on the monotonic clock if there is one, then for the link's end."""
        self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._finished.wait(self._connect_timeout_s + END_MARGIN_S)

    def _ask(self) -> None:
        """Asks for the writes that have waited for it, as many as may be known to the receiver."""
        while True:
            with self._lock:
                if not self._ready or not self._unasked or self._asked >= MAX_ASKED:
                    return
                job = self._unasked.popleft()
                self._asked += 1
                job.asked = True
            if self._channel is not None:
                self._channel.send(job.ask)

    def _report(self, job: _LeasedWrite, error: TransportError | None) -> None:
        with self._lock:
            del self._jobs[job.serial]
            self._asked -= 1
        self._outbox.post(Written(job.ticket, error))
        self._ask()

    # On the engine's thread

    def _on_ready(self) -> None:
        with self._lock:
            self._ready = True
        self._ask()

    def _on_over(self, job: WriteJob) -> None:
        """Tells the receiver first, then the driver."""
        assert isinstance(job, _LeasedWrite)
        awaits_answer = bool(job.go) and self._acknowledged
        job.over = awaits_answer
        if job.go and self._channel is not None:
            self._channel.send(m.Done(job.serial) if job.clean else m.Failed(job.serial))
        if not awaits_answer:
            self._report(job, job.error)

    # The connection

    def _start_check(self) -> None:
        self._heard_at = self._next_check = self.scope.now()
        self._check()

    def _check(self) -> None:
        """Asks for a sign of life, once a second while writes are open; ends the link if there has been none."""
        with self._lock:
            self._is_checking = bool(self._jobs) and self._error is None
        if not self._is_checking:
            return
        now, limit = self.scope.now(), self._stall_timeout_s
        if now - self._next_check > limit / 2 or not self._welcomed:
            self._heard_at = now  # this process was stopped, or the time to connect is still running
        if now - self._heard_at >= limit:
            self._hung_up = True  # it would not hear that it is to cut this sender off
            self.end(TransportStalled(f"nothing has come from the receiver for {limit:g} s"), lost=True)
            return
        if self._channel is not None and self._welcomed:
            self._channel.send(m.Ping())
        pause = progress_interval(limit)
        self._next_check = now + pause
        self.scope.later(pause, self._check)

    def _failed(self, error: BaseException) -> None:
        self._hung_up = True  # the scope has ended: nothing more is read
        super()._failed(error)

    def _check_welcome(self) -> None:
        if not self._welcomed:
            self.end(TransportStalled(f"the receiver did not answer within {self._connect_timeout_s} s"), lost=True)

    def _on_refused(self, error: TransportError) -> None:
        self._hung_up = True
        self.end(error, lost=True)

    def _on_connected(self) -> None:
        sock = self._connector.sock
        assert isinstance(sock, socket.socket)  # without TLS
        self._channel = Channel(
            sock,
            self.scope,
            on_message=self._on_message,
            on_fault=lambda error: self._on_hang_up(str(error)),
            on_end=self._on_hang_up,
            limit=m.MAX_FRAME,
            max_unsent=MAX_UNSENT,
        )
        self._channel.send(self._hello)

    def _on_hang_up(self, reason: str) -> None:
        self._hung_up = True
        self.end(TransportError(f"the connection to the receiver broke: {reason}"), lost=True)
        if self._awaits_hang_up:
            self._finish()

    def _on_message(self, message: m.Message) -> None:
        self._heard_at = self.scope.now()
        match message:
            case m.Pong():
                pass
            case m.Welcome(metadata, base):
                self._base = base
                if not self._welcomed:
                    self._welcomed = True
                    self._thread.meet(metadata)
            case m.Stop(serial):
                if job := self._jobs.get(serial):  # otherwise our "done" is on its way
                    job.stop = self._stop_error()
            case m.Verdict(serial, go) if (job := self._jobs.get(serial)) and job.asked and job.go is None:
                job.base, job.go = self._base, go
                self._thread.look()
            case m.Acknowledged(serial, window_open) if (job := self._jobs.get(serial)) and job.over:
                self._report(job, job.error if window_open else refused())
            case _:
                raise FrameError(f"a receiver does not send {type(message).__name__} here, or not about this write")

    def _stop_error(self) -> TransportError:
        if self._acknowledged:  # whose answer will say whether the window has closed
            return TransportError("the receiver has moved its region to another address during the write; write again")
        return TransportError("the receiver has taken the window back", retryable=False)

    # The end: the engine is closed; if bytes may be in flight, the receiver cuts this sender off; the link is over.

    def _on_engine_end(self, error: TransportError | None, clean: bool) -> None:
        with self._lock:
            if self._error is None:
                self._error, self._lost = error or TransportError("the engine has ended"), True
        if clean or self._hung_up or self._channel is None:
            self._finish()
            return
        self._awaits_hang_up = True
        self._channel.send(m.Broken())
        if not self.scope.later(self._connect_timeout_s, self._finish):
            self._finish()

    def _finish(self) -> None:
        if self._finished.is_set():
            return
        if self._channel is not None:
            self._channel.close()
        else:
            self.scope.unwatch(self._connector.sock.fileno())
            self._connector.sock.close()
        tickets = [job.ticket for job in self._jobs.values()]
        self._jobs.clear()
        try:
            self._on_end(self, tickets, self._error or TransportError("this link has ended"), self._lost)
        finally:
            self._finished.set()
