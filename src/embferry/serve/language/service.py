"""The jobs of a language worker, and the engine thread that runs them."""

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
from embferry.serve.language.job import Event, Job
from embferry.serve.language.messages import GenerateRequest
from embferry.serve.language.metrics import LanguageMetrics
from embferry.serve.language.pipeline import JobPipeline
from embferry.serve.worker.errors import as_serve_error
from embferry.transfer.receive_manager import ReceiveManager

log = logging.getLogger(__name__)

JOIN_SECONDS = 5.0
"""Seconds that the engine thread gets to finish its current step when the worker ends."""


class LanguageService:
    """Implementation of :class:`~embferry.serve.worker.http.Service` for language workers. Owns the manager.

    Model, scheduler and queues belong to the engine thread; other threads give it commands. The manager calls back with
    its lock held, so the callback only sets events.
    """

    def __init__(self, model: LanguageModel, manager: ReceiveManager, settings: Settings) -> None:
        self.manager = manager
        self.settings = settings
        self.metrics = LanguageMetrics(self._states, self._pool_states)
        self.fault: BaseException | None = None
        self._pipeline = JobPipeline(model, manager, settings, self.metrics)
        self._idle = threading.Condition()  # guards the jobs and the commands
        self._jobs: dict[str, Job] = {}
        self._commands: deque[tuple[Callable[[Job], None], Job]] = deque()
        self._numbers = itertools.count()
        self._wake = threading.Event()
        self._transfers_changed = threading.Event()
        self._refusing = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called by the HTTP endpoints, on any thread

    def submit(self, request: GenerateRequest, deliver: Callable[[Event], None]) -> Job:
        """Queues a request.

        Args:
            request: the decoded request.
            deliver: receives the job's events on the engine thread, and must not block; see :class:`.job.Job`.

        Raises:
            CapacityError: the queue is full, or the worker is shutting down.
            LocalProtocolError: a bug has stopped the engine thread.
        """
        limits = self.settings.language
        with self._idle:
            if self.fault is not None:
                raise LocalProtocolError(f"a bug has stopped this language worker: {self.fault!r}", retryable=True)
            if self._refusing or self._stopping:
                raise CapacityError("this language worker is shutting down; ask another", room=request.room)
            if len(self._jobs) >= limits.max_concurrent + limits.max_queued:
                limit = f"{len(self._jobs)} open requests (language.max_queued)"
                raise CapacityError(f"this language worker has {limit}; try again later", room=request.room)
            job = Job(f"job-{next(self._numbers)}", request, lambda event: None)
            job.deliver = lambda event: self._deliver(job, event, deliver)
            self._jobs[job.id] = job
            self._commands.append((lambda job: self._pipeline.begin(job, self._on_transfer_change), job))
        self._wake.set()
        return job

    def abort(self, job: Job) -> None:
        """Ends a job; its blocks go back to the pool. Does nothing if it has ended."""
        with self._idle:
            if job.id in self._jobs:
                self._commands.append((self._pipeline.abort, job))
        self._wake.set()

    def abort_room(self, room: int) -> bool:
        with self._idle:
            found = [job for job in self._jobs.values() if job.request.room == room]
        for job in found:
            self.abort(job)
        return bool(found)

    def pool(self) -> dict[str, int]:
        """Returns the number of blocks in the receive pool, in total and by state."""
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

    # Called on the engine thread

    def _run(self) -> None:
        torch.set_num_threads(self.settings.threads)  # OpenMP keeps this setting per thread
        why = "the language worker is shutting down"
        try:
            while not self._stopping:
                self._run_once()
            self._pipeline.shut_down()
        except Exception as error:
            log.critical("the engine thread has stopped; please report this bug", exc_info=error)
            why = "a bug has stopped the language worker"
            with self._idle:
                self.fault = error
        with self._idle:
            unfinished = list(self._jobs.values())  # among them jobs that have not begun
        for job in unfinished:
            job.deliver(as_serve_error(PeerGone(f"{why}; ask again", room=job.request.room)))

    def _run_once(self) -> None:
        self._wake.clear()
        while self._commands:
            command, job = self._commands.popleft()
            command(job)
        if self._transfers_changed.is_set():
            self._transfers_changed.clear()
            self._pipeline.advance_transfers()
        if not self._pipeline.step() and not self._stopping:
            self._wake.wait()

    def _on_transfer_change(self) -> None:
        """Wakes the engine thread. Called on any thread, with the manager's lock held."""
        self._transfers_changed.set()
        self._wake.set()

    def _deliver(self, job: Job, event: Event, deliver: Callable[[Event], None]) -> None:
        if isinstance(event, ServeError) or event["type"] == "end":
            with self._idle:
                self._jobs.pop(job.id, None)
                self._idle.notify_all()
        deliver(event)

    # Called by the metrics, on any thread

    def _states(self) -> dict[str, float]:
        pipeline = self._pipeline
        return {
            "prealloc": len(pipeline.prealloc_queue),
            "transfer": len(pipeline.transfer_queue),
            "waiting": pipeline.scheduler.num_queued,
            "running": pipeline.scheduler.num_running,
        }

    def _pool_states(self) -> dict[str, float]:
        pool = self.pool()
        return {"free": pool["available"], "used": pool["used"], "quarantined": pool["quarantined"]}
