"""The language worker's engine thread, and the face of it for other threads."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry

from embferry.engine.language import LanguageModel
from embferry.protocol.errors import CapacityError, LocalProtocolError, PeerGone
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.language.engine import Engine
from embferry.serve.language.job import Event, Job
from embferry.serve.language.metrics import LanguageMetrics
from embferry.serve.language.wire import GenerateRequest
from embferry.serve.worker.errors import as_serve_error
from embferry.transfer.receive_manager import ReceiveManager

log = logging.getLogger(__name__)

JOIN_SECONDS = 5.0
"""Seconds the model may take to finish the step it is at when the worker ends."""


class LanguageService:
    """Owns the manager. Model, scheduler and queues belong to one thread; others hand it what is to be done.

    What the manager calls back only sets an event: its lock is held then.
    """

    def __init__(self, model: LanguageModel, manager: ReceiveManager, settings: Settings) -> None:
        self.manager = manager
        self.settings = settings
        self.metrics = LanguageMetrics(self._states, self._pool_states)
        self.fault: BaseException | None = None
        self._engine = Engine(model, manager, settings, self.metrics)
        self._idle = threading.Condition()  # of the two below
        self._jobs: dict[str, Job] = {}
        self._orders: deque[tuple[Callable[[Job], None], Job]] = deque()
        self._numbers = itertools.count()
        self._wake = threading.Event()
        self._moved = threading.Event()
        self._refusing = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # For HTTP: any thread

    def submit(self, request: GenerateRequest, deliver: Callable[[Event], None]) -> Job:
        """Puts a request into the queue. All else is told through ``deliver``; see :class:`.job.Job`.

        :raises CapacityError: the queue is full, or the worker is shutting down.
        """
        limits = self.settings.language
        with self._idle:
            if self.fault is not None:
                raise LocalProtocolError(f"this worker has stopped by a bug: {self.fault!r}", retryable=True)
            if self._refusing or self._stopping:
                raise CapacityError("this language worker is shutting down; ask another", room=request.room)
            if len(self._jobs) >= limits.max_concurrent + limits.max_queued:
                why = f"this language worker has {len(self._jobs)} requests in hand (language.max_queued)"
                raise CapacityError(f"{why}; try again later", room=request.room)
            job = Job(f"job-{next(self._numbers)}", request, lambda event: None)
            job.deliver = lambda event: self._deliver(job, event, deliver)
            self._jobs[job.id] = job
            self._orders.append((lambda job: self._engine.begin(job, self._changed), job))
        self._wake.set()
        return job

    def abort(self, job: Job) -> None:
        """Ends a job; nothing happens if it has ended. Its blocks go back to the pool."""
        with self._idle:
            if job.id in self._jobs:
                self._orders.append((self._engine.abort, job))
        self._wake.set()

    def abort_room(self, room: int) -> bool:
        with self._idle:
            found = [job for job in self._jobs.values() if job.request.room == room]
        for job in found:
            self.abort(job)
        return bool(found)

    def pool(self) -> dict[str, int]:
        """The receive pool: blocks in all, and by who has them."""
        with self.manager.lock:
            allocator = self.manager.allocator
            return {
                "num_blocks": allocator.num_blocks,
                "available": allocator.available,
                "used": allocator.used,
                "quarantined": allocator.quarantined,
            }

    @property
    def registry(self) -> CollectorRegistry:
        return self.metrics.registry

    @property
    def load(self) -> float:
        return len(self._jobs)

    def refuse(self) -> None:
        self._refusing = True

    def wait_idle(self, seconds: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not self._jobs or self.fault is not None, seconds)

    def close(self) -> None:
        with self._idle:
            if self._stopping:
                return
            self._stopping = True
        self._wake.set()
        self._thread.join(JOIN_SECONDS)
        self.manager.close()

    # The engine's thread

    def _run(self) -> None:
        torch.set_num_threads(self.settings.threads)  # OpenMP keeps this by thread
        try:
            while not self._stopping:
                self._turn()
            self._engine.shut_down()
        except Exception as error:
            log.critical("the engine's thread has stopped; this is a bug", exc_info=error)
            self._break(error)

    def _turn(self) -> None:
        self._wake.clear()
        while self._orders:
            what, job = self._orders.popleft()
            what(job)
        if self._moved.is_set():
            self._moved.clear()
            self._engine.move()
        if not self._engine.step() and not self._stopping:
            self._wake.wait()

    def _changed(self) -> None:
        self._moved.set()
        self._wake.set()

    def _deliver(self, job: Job, event: Event, deliver: Callable[[Event], None]) -> None:
        if isinstance(event, ServeError) or (isinstance(event, dict) and event["type"] == "end"):
            with self._idle:
                self._jobs.pop(job.id, None)
                self._idle.notify_all()
        deliver(event)

    def _break(self, error: Exception) -> None:
        """Nobody waits for a thread that is no more."""
        with self._idle:
            self.fault = error
            jobs = list(self._jobs.values())
            self._engine.jobs.clear()
        for job in jobs:
            job.deliver(as_serve_error(PeerGone("the language worker has stopped by a bug; ask again")))

    # For metrics

    def _states(self) -> dict[str, float]:
        engine = self._engine
        return {
            "prealloc": len(engine.prealloc),
            "transfer": len(engine.transfer),
            "waiting": engine.scheduler.num_queued,
            "running": engine.scheduler.num_running,
        }

    def _pool_states(self) -> dict[str, float]:
        pool = self.pool()
        return {"free": pool["available"], "used": pool["used"], "quarantined": pool["quarantined"]}
