"""The thread that drives one engine of a sender: starts requests and polls until they are over.

Each link has a thread and an engine of its own, because engines block: to make one takes a tenth of a second, and NIXL
on shared memory copies a request before the call returns. Neither engine offers a descriptor to wait for, so while
requests are in flight the thread polls; otherwise it sleeps.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from embferry.protocol.errors import TransportError

from ..net.link import refused
from .jobs import Run, Sources, WriteJob

log = logging.getLogger(__name__)

LIVENESS_CHECK_S = 1.0
PAUSE_FRACTION = 1 / 24
"""A pause between two polls is this part of the time that the oldest request has taken: the most that it can add."""
MIN_PAUSE_S, MAX_PAUSE_S = 50e-6, 2e-3


class WriteFailedError(TransportError):
    """One request has failed; the engine can go on with others."""


def without_traceback(error: TransportError) -> TransportError:
    """Returns the same error without its traceback, whose frames would keep an engine alive."""
    return TransportError(error.detail, retryable=error.retryable)


class WriteEngine(ABC):
    """An engine that writes to one peer. Used by its thread alone; its constructor makes the engine.

    Attributes:
        slice_bytes: The largest request. Between two of them the thread notices that it has to stop, and other writes
            get their turn.
        max_runs: How many runs one request may have.
        max_requests: Requests in flight at a time.
        max_bytes: Bytes in flight at which no further request is started.
        drain_timeout_s: How long requests in flight may take to end when the engine is to end.
        registers_sources: The engine reads from registered memory only.
    """

    slice_bytes: int
    max_runs: ClassVar[int] = 1
    max_requests: int
    max_bytes: float = float("inf")
    drain_timeout_s: float = 0.0
    registers_sources: bool = True

    def meet(self, metadata: bytes) -> None:  # noqa: B027  (Mooncake knows its peer from the handle)
        """Makes the peer with this metadata known.

        Raises:
            TransportError: The engines cannot work with each other.
        """

    @abstractmethod
    def register(self, address: int, length: int) -> Any:
        """Registers source memory. Returns what :meth:`deregister` takes.

        Raises:
            TransportError: The engine does not take the memory.
        """

    @abstractmethod
    def deregister(self, registered: Any) -> None: ...

    def ready(self, *, idle: bool) -> bool:
        """Returns whether requests may be started now; ``idle``: none is in flight.

        Raises:
            TransportError: The engine is of no more use.
        """
        return True

    def prepare(self, part: list[Run]) -> Any:
        """Returns what :meth:`start` takes, so that nothing is left to be done there but the write.

        Raises:
            WriteFailedError: The engine does not take it.
        """
        return part

    @abstractmethod
    def start(self, prepared: Any) -> int:
        """Starts to write what was prepared just now. Returns the number of the request.

        Raises:
            WriteFailedError: Nothing of it was sent.
            TransportError: The engine has failed; bytes may be in flight.
        """

    @abstractmethod
    def is_over(self, request: int) -> bool:
        """Returns whether every byte of a request is in the peer's memory.

        Raises:
            WriteFailedError: The request has failed; bytes of it may be in flight.
            TransportError: The engine has failed; bytes of any request may be in flight.
        """

    def release(self, request: int) -> None:  # noqa: B027  (Mooncake keeps nothing)
        """Frees what the engine keeps of a request; called once, when it is over or given up."""

    @abstractmethod
    def close(self) -> None:
        """Ends the engine: no source is read any more."""


@dataclass(eq=False, slots=True)
class _InFlight:
    job: WriteJob
    request: int
    nbytes: int
    began: float


class EngineThread:
    """Writes jobs until it is told to stop, then ends its engine. Its methods may be called from any thread.

    All callbacks run on the engine's thread, with no lock held.

    Args:
        open_engine: Makes the engine; runs on the thread.
        on_ready: The engine has met the peer, see :meth:`meet`.
        on_over: A job has ended; unless it is unclean no byte of it is in flight.
        on_end: Called once, last: the engine is closed and no source is read any more. Gets the error, None if the
            thread was told to stop; and whether it is certain that no byte is in flight.
    """

    def __init__(
        self,
        name: str,
        open_engine: Callable[[], WriteEngine],
        *,
        on_ready: Callable[[], None] = lambda: None,
        on_over: Callable[[WriteJob], None],
        on_end: Callable[[TransportError | None, bool], None],
    ) -> None:
        self._open_engine = open_engine
        self._on_ready, self._on_over, self._on_end = on_ready, on_over, on_end
        self._news = threading.Event()
        self._stopping = False
        self._metadata: bytes | None = None
        self._waiting: deque[WriteJob] = deque()  # for their source or their verdict; any thread appends
        # For the thread.
        self._sources: Sources | None = None
        self._active: deque[WriteJob] = deque()
        self._in_flight: list[_InFlight] = []  # the oldest first
        self._over: deque[WriteJob] = deque()  # to be reported
        self._in_doubt = False
        self._thread = threading.Thread(target=self._run, name=name)
        self.start, self.join = self._thread.start, self._thread.join
        self.look = self._news.set
        """Wakes the thread, because a verdict has come."""

    def meet(self, metadata: bytes) -> None:
        """Makes the peer known to the engine, once."""
        self._metadata = metadata
        self.look()

    def put(self, job: WriteJob) -> None:
        """Takes in a write, to be begun when its verdict is "go"; :meth:`look` is called when that has come."""
        self._waiting.append(job)
        if job.go is not None:  # it has come before the write
            self.look()

    def stop(self) -> None:
        """Has the thread start nothing more, drain, and close its engine. Does not wait. Idempotent."""
        self._stopping = True
        self.look()

    # On the thread

    def _run(self) -> None:
        error: TransportError | None = None
        try:
            engine = self._open_engine()
            try:
                self._work(engine)
            except TransportError as failed:
                error = without_traceback(failed)
            finally:
                self._report()
                self._abandon(engine)
                engine.close()
        except TransportError as failed:
            error = without_traceback(failed)
        except Exception as bug:
            log.exception("the thread %s has ended", threading.current_thread().name)
            error, self._in_doubt = TransportError(f"a thread of the transport ended with {bug!r}"), True
        self._on_end(error, not self._in_doubt)

    def _work(self, engine: WriteEngine) -> None:
        """Writes until it is told to stop.

        Raises:
            TransportError: The engine is of no more use.
        """
        self._sources = Sources(engine.register, engine.deregister) if engine.registers_sources else None
        pause: float | None = None
        while self._wait(pause):
            if self._metadata is not None:
                engine.meet(self._metadata)
                self._metadata = None
                self._on_ready()
            moved = self._collect(engine) | self._activate_next() | self._start_next(engine)
            self._report()
            pause = 0.0 if moved else self._pause()
        deadline = time.monotonic() + engine.drain_timeout_s
        while self._in_flight and time.monotonic() < deadline:
            if not self._collect(engine):
                time.sleep(self._pause() or 0.0)

    def _wait(self, pause: float | None) -> bool:
        """Waits for news, at most ``pause`` seconds. Returns False when it is time to end."""
        # A program that ends without closing its transport must end all the same, so look at the main thread.
        while not self._news.wait(LIVENESS_CHECK_S if pause is None else pause) and pause is None:
            if not threading.main_thread().is_alive():
                return False
        self._news.clear()
        return not self._stopping and threading.main_thread().is_alive()

    def _pause(self) -> float | None:
        """Returns the seconds to wait before the next poll; None: until there is news."""
        if not self._in_flight:
            return None
        age = time.monotonic() - self._in_flight[0].began
        return min(MAX_PAUSE_S, max(MIN_PAUSE_S, age * PAUSE_FRACTION))

    def _activate_next(self) -> bool:
        """Lets the first of the waiting jobs that can be begun take its turns. Returns whether there was one.

        Only one: the first request does not wait until the sources of later jobs are registered.
        """
        for at, job in enumerate(self._waiting.copy()):
            if job.go is not None and self._prepare(job):
                del self._waiting[at]
                self._active.append(job)
                return True
        return False

    def _prepare(self, job: WriteJob) -> bool:
        """Registers the source of a job that needs it. Returns False while it overlaps the source of another."""
        if self._sources is None or job.registered or job.error is not None or job.stop is not None:
            return True
        try:
            job.registered = self._sources.acquire(job.source)
        except TransportError as error:
            job.error = without_traceback(error)
        return job.registered or job.error is not None

    def _start_next(self, engine: WriteEngine) -> bool:
        """Starts a request of the active jobs, which take turns, if there is room. Returns whether anything moved.

        Only one: an engine may copy all of it within the call, and its end is reported before the next begins. That is
        the last thing before the call: the thread that it wakes gets the interpreter when the engine copies.
        """
        if not engine.ready(idle=not self._in_flight) or not self._has_room(engine) or not self._active:
            return False
        job = self._active.popleft()
        if not job.go:
            job.error = refused()
        if job.error is None and not job.exhausted:
            part = job.next_part(engine.slice_bytes, engine.max_runs)
            if part is not None:
                job.error = job.stop
            if part is not None and job.error is None and self._start(engine, job, part):
                if not job.exhausted:
                    self._active.append(job)
                return True
        job.exhausted = True
        self._finish(job)
        return True

    def _has_room(self, engine: WriteEngine) -> bool:
        nbytes = sum(flight.nbytes for flight in self._in_flight)
        return nbytes < engine.max_bytes and len(self._in_flight) < engine.max_requests

    def _start(self, engine: WriteEngine, job: WriteJob, part: list[Run]) -> bool:
        """Starts a request of the job. Returns False if the engine has not taken it."""
        try:
            prepared = engine.prepare(part)
            self._report()
            began = time.monotonic()
            request = engine.start(prepared)
        except WriteFailedError as failed:
            job.error = without_traceback(failed)
            return False
        except TransportError:
            self._in_doubt = True
            raise
        self._in_flight.append(_InFlight(job, request, sum(length for _, _, length in part), began))
        job.in_flight += 1
        return True

    def _collect(self, engine: WriteEngine) -> bool:
        """Takes out the requests that are over. Returns whether there were any."""
        before = len(self._in_flight)
        for flight in list(self._in_flight):
            job = flight.job
            try:
                if not engine.is_over(flight.request):
                    continue
            except WriteFailedError as failed:
                job.error, job.clean = without_traceback(failed), False
            self._in_flight.remove(flight)  # what is still in it when an error is raised below is in doubt
            job.in_flight -= 1
            engine.release(flight.request)
            self._finish(job)
        return len(self._in_flight) < before

    def _finish(self, job: WriteJob) -> None:
        if job.exhausted and job.in_flight == 0:
            if self._sources is not None and job.registered:
                self._sources.release(job.source)
            self._over.append(job)

    def _report(self) -> None:
        while self._over:
            self._on_over(self._over.popleft())

    def _abandon(self, engine: WriteEngine) -> None:
        """Lets go of requests that have failed or not ended; the engine is about to be closed."""
        for flight in self._in_flight:
            self._in_doubt = True
            try:
                engine.release(flight.request)
            except TransportError as error:
                log.info("%s", error)
        self._in_flight.clear()
        self._waiting.clear()
        self._active.clear()
