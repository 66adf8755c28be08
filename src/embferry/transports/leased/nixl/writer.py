"""The thread that drives one link's agent: posts requests, looks whether they are over. Nobody else touches the agent.

A thread of its own, because the engine blocks: making an agent takes a tenth of a second, and on shared memory a posted
request is copied before the call returns. NIXL offers no descriptor to wait for, so while requests are in flight the
thread looks every :data:`POLL_S` or less often; otherwise it sleeps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from embferry.protocol.errors import TransportError

from .agent import Agent, Backends, Descriptors, Transfer, fresh
from .job import Job
from .sources import Sources

log = logging.getLogger(__name__)

DEPTH = 4  # requests in flight: the next is on its way while the last is being acknowledged
POLL_S, MAX_POLL_S = 0.00005, 0.001
LIVENESS_CHECK_S = 1.0


class Writer:
    """
    :param slice_bytes: the largest request; between two the writer looks whether it has to stop, and other jobs
        get their turn.
    :param drain_timeout_s: how long requests in flight may take to end after :meth:`stop`.
    :param on_ready: the receiver has been met.
    :param on_over: a job has ended with the error or without; no byte of it is on its way.
    :param on_end: once, the last: the agent is destroyed, no source is read any more. The error, if it was not told to
        stop; and whether it is certain that no byte is on its way.
    :param on_bug: the thread died of an exception.

    All of them are called on the writer's thread.
    """

    def __init__(
        self,
        backends: Backends,
        *,
        slice_bytes: int,
        drain_timeout_s: float,
        on_ready: Callable[[], None],
        on_over: Callable[[Job, TransportError | None], None],
        on_end: Callable[[TransportError | None, bool], None],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._backends, self._slice_bytes, self._drain_timeout_s = backends, slice_bytes, drain_timeout_s
        self._on_ready, self._on_over, self._on_end, self._on_bug = on_ready, on_over, on_end, on_bug
        self._changed = threading.Condition()
        self._metadata: bytes | None = None
        self._base = 0
        self._given: deque[Job] = deque()
        self._stopping = False
        # For the thread.
        self._peer = ""
        self._active: deque[Job] = deque()
        self._in_flight: list[tuple[Job, Transfer]] = []
        self._dirty = False  # it has ended with bytes on their way, perhaps
        self._thread = threading.Thread(target=self._run, name="embferry-nixl-writer")

    def start(self) -> None:
        self._thread.start()

    def meet(self, metadata: bytes, base: int) -> None:
        """:param base: the address of the receiver's region over there."""
        with self._changed:
            self._metadata, self._base = metadata, base
            self._changed.notify()

    def put(self, job: Job) -> None:
        """A write, to be begun when its verdict is "go"."""
        with self._changed:
            self._given.append(job)
            self._changed.notify()

    def look(self) -> None:
        """A verdict has come."""
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """Begins nothing more, lets what is in flight end, destroys the agent. Does not wait. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    # On the thread.

    def _run(self) -> None:
        error: TransportError | None = None
        try:
            agent = Agent(self._backends)
            try:
                self._work(agent)
            except TransportError as failed:
                error = fresh(failed)
            finally:
                self._abandon()
                agent.close()
        except TransportError as failed:
            error = fresh(failed)
        except Exception as bug:
            log.exception("the thread %s has ended", threading.current_thread().name)
            self._on_bug(bug)
            error, self._dirty = TransportError(f"a thread of the transport ended with {bug!r}"), True
        self._on_end(error, not self._dirty)

    def _work(self, agent: Agent) -> None:
        """Until it is told to stop.

        :raises TransportError: the link is of no more use."""
        while self._metadata is None:
            if not self._wait(lambda: self._metadata is not None):
                return
        self._peer = agent.join(self._metadata)
        self._on_ready()
        sources = Sources(agent)
        pause = 0.0
        while self._wait(self._has_work, pause):
            moved = self._post(agent, sources)
            moved |= self._collect(sources)
            pause = 0.0 if moved else min(max(POLL_S, 2 * pause), MAX_POLL_S)
        deadline = time.monotonic() + self._drain_timeout_s
        while self._in_flight and time.monotonic() < deadline:
            if not self._collect(sources):
                time.sleep(MAX_POLL_S)

    def _wait(self, something: Callable[[], bool], pause: float = 0.0) -> bool:
        """Waits ``pause``, and then for something to do; a job that comes ends both. False when it is time to end."""
        with self._changed:
            if pause and not self._given and not self._stopping:
                self._changed.wait(pause)
            while not self._stopping and not self._given and not something():
                # A program that ends without closing its transport must end all the same.
                if not self._changed.wait(LIVENESS_CHECK_S) and not threading.main_thread().is_alive():
                    self._stopping = True
            self._active += self._given
            self._given.clear()
            return not self._stopping

    def _post(self, agent: Agent, sources: Sources) -> bool:
        """One request of each job, while there is room. Whether anything moved."""
        moved = False
        for _ in range(len(self._active)):
            if len(self._in_flight) >= DEPTH or self._stopping:
                break
            job = self._active.popleft()
            if job.slices is None and not self._begin(job, sources):
                self._active.append(job)  # it waits for another to release its source
                continue
            if job.go is None:
                self._active.append(job)
                continue
            moved = True
            part = self._next(job)
            if part is not None:
                self._post_part(agent, job, *part)
                self._active.append(job)
            else:
                job.exhausted = True
                self._finish(job, sources)
        return moved

    def _has_work(self) -> bool:
        return bool(self._in_flight) or any(job.slices is None or job.go is not None for job in self._active)

    def _begin(self, job: Job, sources: Sources) -> bool:
        job.lay_out()
        try:
            if not sources.acquire(job.source):
                return False
        except TransportError as error:
            job.error, job.source = fresh(error), []
        job.cut(self._base, self._slice_bytes)
        return True

    def _next(self, job: Job) -> tuple[Descriptors, Descriptors] | None:
        if not job.go:
            job.error = TransportError("the receiver has no open window that covers the write", retryable=False)
        if job.error is not None or job.slices is None:
            return None
        part = next(job.slices, None)
        if part is not None and job.stopped:
            job.error = TransportError("the receiver has taken the window back", retryable=False)
            return None
        return part

    def _post_part(self, agent: Agent, job: Job, local: Descriptors, remote: Descriptors) -> None:
        try:
            transfer = agent.prepare(self._peer, local, remote)
        except TransportError as error:  # nothing has been sent: this job alone has failed
            job.error = fresh(error)
            return
        job.in_flight += 1
        self._in_flight.append((job, transfer))
        transfer.post()

    def _collect(self, sources: Sources) -> bool:
        """Takes out what is over. Whether anything was."""
        before = self._in_flight
        self._in_flight = []
        for at, (job, transfer) in enumerate(before):
            try:
                over = transfer.is_over()
            except TransportError:
                self._in_flight += before[at:]
                raise
            if over:
                transfer.release()
                job.in_flight -= 1
                self._finish(job, sources)
            else:
                self._in_flight.append((job, transfer))
        return len(self._in_flight) < len(before)

    def _finish(self, job: Job, sources: Sources) -> None:
        if job.exhausted and job.in_flight == 0:
            sources.release(job.source)
            self._on_over(job, job.error)

    def _abandon(self) -> None:
        """Lets go of requests that have failed or not ended; the agent is about to be destroyed."""
        for _, transfer in self._in_flight:
            self._dirty = True
            try:
                transfer.release()
            except TransportError as error:
                log.info("%s", error)
        self._in_flight.clear()
        self._active.clear()
