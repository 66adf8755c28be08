"""The jobs of a language worker, and the engine thread that runs them."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from embferry.disaggregation.wires import ReceivingManager
from embferry.engine.grammar import MATCHER_BYTES
from embferry.engine.language import LanguageModel
from embferry.serve.byte_budget import Hold
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.language.job import Event, Job
from embferry.serve.language.job_trace import JobTrace
from embferry.serve.language.messages import GenerateRequest
from embferry.serve.language.metrics import LanguageMetrics
from embferry.serve.language.pipeline import JobPipeline
from embferry.serve.language.prompting import PromptThreads
from embferry.serve.worker.service import Service
from embferry.traces.context import TraceContext

log = logging.getLogger(__name__)


class LanguageService(Service[ReceivingManager, str, Job]):
    """The jobs of a language worker. The lock guards them and the commands.

    Model, scheduler and queues belong to the engine thread; other threads give it commands. A change of a transfer
    wakes the engine thread from the thread that made it, without a lock of the manager.
    """

    role, thread_name = "language", "engine"
    pipeline: ClassVar[type[JobPipeline]] = JobPipeline

    def __init__(self, model: LanguageModel, manager: ReceivingManager, settings: Settings) -> None:
        super().__init__(manager, settings)
        self.metrics = LanguageMetrics(self._states, self._pool_states)
        self.metrics.watch(manager, self.budget)
        self._pipeline = self.pipeline(model, manager, settings, self.metrics)
        self._commands: deque[tuple[Callable[[Job], None], Job]] = deque()
        self._numbers = itertools.count()
        self._transfers_changed = threading.Event()
        self._thread.start()

    # Called by the HTTP endpoints, on any thread

    def submit(
        self,
        request: GenerateRequest,
        deliver: Callable[[Event], None],
        hold: Hold | None = None,
        call: TraceContext | None = None,
    ) -> Job:
        """Queues a request.

        Args:
            request: the decoded request.
            deliver: receives the job's events on the engine thread, and must not block; see :class:`.job.Job`.
            hold: the request's share of ``budget``, which the job releases at its end; None: a new one.
            call: the span of the caller, if the job is to have spans.

        Raises:
            CapacityError: the queue is full, or the worker is shutting down.
            ServeError: capacity_exhausted: other jobs hold too many bytes; worker_ending: a bug has stopped the engine
                thread.
        """
        limits = self.settings.language
        hold = hold or self.budget.hold()
        # A prompt with more tokens than the limit is refused later, with an error that says so.
        merge = self._pipeline.model.prompts.merge
        tokens = min(sum(shape.num_tokens(merge) for shape in request.shapes), limits.max_prompt_tokens)
        with self._lock:
            if self.fault is not None:
                raise ServeError("worker_ending", f"a bug has stopped this language worker: {self.fault!r}")
            self._check_capacity(limits.max_concurrent + limits.max_queued, "language.max_queued", request.room)
            hold.add(tokens * self.manager.geometry.layout.token_bytes)
            hold.add(MATCHER_BYTES if request.sampling.constraint is not None else 0)
            job = Job(f"job-{next(self._numbers)}", request, lambda event: None, hold)
            job.deliver = lambda event: self._deliver(job, event, deliver)
            if self.tracer is not None and call is not None:
                job.trace = JobTrace(self.tracer, call)
            self._open[job.id] = job
            self._commands.append((self._begin, job))
        self._wake.set()
        return job

    @property
    def prompts(self) -> PromptThreads:
        """The threads that tokenize."""
        return self._pipeline.prompts

    def abort(self, job: Job) -> None:
        """Ends a job; its blocks go back to the pool. Does nothing if it has ended."""
        with self._idle:
            if job.id in self._open:
                self._commands.append((self._pipeline.abort, job))
        self._wake.set()

    def abort_room(self, room: int) -> bool:
        with self._idle:
            found = [job for job in self._open.values() if job.request.room == room]
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

    def close(self) -> None:
        super().close()
        self._pipeline.close()

    # Called on the engine thread

    def _step(self) -> bool:
        while self._commands:
            command, job = self._commands.popleft()
            self._pipeline.guard(job, command, job)
        if self._transfers_changed.is_set():
            self._transfers_changed.clear()
            self._pipeline.advance_transfers()
        return self._pipeline.step()

    def _run(self) -> None:
        super()._run()
        why = "the language worker is shutting down" if self.fault is None else "a bug has stopped the language worker"
        if self.fault is None:
            self._pipeline.shut_down(f"{why}; ask again")
        with self._lock:
            unfinished = list(self._open.values())  # among them jobs that have not begun
        for job in unfinished:
            job.deliver(ServeError("worker_ending", f"{why}; ask again"))

    def _begin(self, job: Job) -> None:
        def built() -> None:
            self._commands.append((lambda job: self._pipeline.accept(job, self._on_transfer_change), job))
            self._wake.set()

        self._pipeline.begin(job, built)

    def _on_transfer_change(self) -> None:
        """Wakes the engine thread. Called on any thread, without a lock of the manager."""
        self._transfers_changed.set()
        self._wake.set()

    def _deliver(self, job: Job, event: Event, deliver: Callable[[Event], None]) -> None:
        if isinstance(event, ServeError) or event["type"] == "end":
            with self._idle:
                job.hold.release()
                self._open.pop(job.id, None)  # only now: a worker without a request holds nothing
                self._idle.notify_all()
            if job.trace is not None:
                job.end_trace(event)
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
