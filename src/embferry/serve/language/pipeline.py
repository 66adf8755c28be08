"""The stages of a job: the queues of its transfer, then the model's scheduler.

begin --prompt built--> accept

accept --with media--> PreallocQueue --> TransferQueue --first tokens arrived--> scheduler: waiting, running --> end
       --text only------------------------------------------------------------^
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, ParamSpec

from embferry.disaggregation.multimodal_language import (
    MultimodalLanguagePreallocQueue,
    MultimodalLanguageRequest,
    MultimodalLanguageTransferQueue,
)
from embferry.disaggregation.queues import ReceivingEnd
from embferry.disaggregation.wires import ReceivingManager
from embferry.engine.language import LanguageModel
from embferry.engine.prompt import Prompt, stream_digest
from embferry.engine.scheduler import EmbeddingSource, Output, Request, Scheduler
from embferry.kept.folder import KeptFolder
from embferry.kept.sink import KeptSink
from embferry.protocol.errors import Aborted, EmbeddingTransferError
from embferry.serve.config import LanguageSettings, Settings
from embferry.serve.errors import ServeError
from embferry.serve.language.job import ACCEPTED, Job
from embferry.serve.language.metrics import LanguageMetrics
from embferry.serve.language.prompting import Built, PromptThreads
from embferry.serve.language.transfer_source import TransferSource
from embferry.serve.worker.errors import as_serve_error
from embferry.transfer.failures import attempt
from embferry.transfer.receive_handle import EmbeddingReceiver
from embferry.transfer.receive_manager import ReceiveManager

log = logging.getLogger(__name__)

P = ParamSpec("P")


class JobPipeline:
    """All jobs of a worker. Used on the engine thread only."""

    def __init__(
        self, model: LanguageModel, manager: ReceivingManager, settings: Settings, metrics: LanguageMetrics
    ) -> None:
        self.model = model
        self.manager = manager
        self.metrics = metrics
        # The service limits the number of jobs; the scheduler's own limit must not refuse one that was admitted.
        self.limits = limits = settings.language
        max_jobs = limits.max_concurrent + limits.max_queued
        self.scheduler = Scheduler(model, max_running=limits.max_concurrent, max_queued=max_jobs)
        self.prompts = PromptThreads(model.prompts, model.grammars, limits, settings.threads)
        self.prealloc_queue = MultimodalLanguagePreallocQueue(self._on_failure)
        self.transfer_queue = MultimodalLanguageTransferQueue(self._on_failure)
        self.kept = _kept_folder(limits, manager)
        metrics.watch_kept(self.kept)
        self.jobs: dict[str, Job] = {}

    def guard(self, job: Job, call: Callable[P, None], *arguments: P.args, **keywords: P.kwargs) -> None:
        """Makes a call for a job. An exception ends that job only."""
        if (error := attempt(call, *arguments, **keywords)) is not None:
            self._fail(job, error)

    def begin(self, job: Job, built: Callable[[], None]) -> None:
        """Has the prompt built.

        Args:
            job: the new job.
            built: called on any thread, when :meth:`accept` can be called.
        """
        self.jobs[job.id] = job

        def done(building: Future[Built]) -> None:
            if (error := attempt(self._take_kept, job, building)) is not None:
                log.error("what a killed worker has kept could not be looked for", exc_info=error)
            built()

        job.building = self.prompts.submit(job.request, done)

    def accept(self, job: Job, wake: Callable[[], None]) -> None:
        """Takes the prompt and opens the transfer, then delivers ``ACCEPTED``. Does nothing if the job has ended.

        Args:
            job: the job, whose prompt has been built.
            wake: called on any thread, without a lock of the manager, when the job's transfer has changed. It must not
                block.

        Raises:
            Exception: the request is bad, or the transfer cannot begin.
        """
        if job.id not in self.jobs or job.building is None:
            if job.sink is not None:
                job.sink.drop()
            return
        job.built = job.building.result()
        job.prompt = job.built.prompt
        job.mark("opened")
        if self._receives(job.prompt):
            job.receiver = self._open(job, job.prompt)
            job.receiver.wake_on_change(partial(_changed, job, wake) if job.is_watched else wake)
            self.prealloc_queue.add(job, job.receiver)
        else:
            self._schedule(job, job.prompt)
        job.deliver(ACCEPTED)

    def _take_kept(self, job: Job, building: Future[Built]) -> None:
        """Makes the sink of a job, with what a killed worker on this host had received. On the thread of the prompt."""
        if self.kept is None or building.cancelled() or building.exception() is not None:
            return
        total = building.result().prompt.num_visual
        digest = stream_digest([shape.digest for shape in job.request.shapes])
        job.sink = KeptSink(self.kept, self.kept.take(digest, total) if total and digest else None)

    def _receives(self, prompt: Prompt) -> bool:
        """Returns whether the job needs an embedding from elsewhere."""
        return prompt.num_visual > 0

    def _open(self, job: Job, prompt: Prompt) -> ReceivingEnd:
        """Opens the receiving end of the job's embedding."""
        room, endpoint = job.request.room, job.request.endpoint
        assert room is not None, "GenerateRequest checks it"
        assert endpoint is not None, "GenerateRequest checks it"
        assert isinstance(self.manager, ReceiveManager)
        return self.manager.open(room, endpoint, job.sink, max_tokens=prompt.num_visual)

    def close(self) -> None:
        """Ends the threads of prompts, and removes the files of embeddings under way. The manager is closed."""
        self.prompts.close()
        if self.kept is not None:
            self.kept.close()

    def abort(self, job: Job) -> None:
        """Ends a job. Does nothing if it has ended."""
        if job.id in self.jobs:
            self.metrics.aborted.inc()
            self._fail(job, Aborted("aborted by the caller", room=job.request.room))

    def shut_down(self, why: str) -> None:
        """Ends every job with ``worker_ending``."""
        for job in list(self.jobs.values()):
            self._fail(job, ServeError("worker_ending", why))

    def advance_transfers(self) -> None:
        """Moves each job whose transfer has changed to its next stage."""
        for request in self.prealloc_queue.pop_preallocated():
            self.transfer_queue.add(request)
        for request in self.transfer_queue.pop_arriving():
            self.guard(request.req, self._arrived, request.req)
        for request in self.transfer_queue.pop_transferred():
            self.guard(request.req, self._transferred, request.req)
        for request in list(self.transfer_queue.queue):
            if request.req.id in self.jobs and request.transferred_tokens:
                self.guard(request.req, self._tell_progress, request.req, request.transferred_tokens)

    def _arrived(self, job: Job) -> None:
        job.mark("arrived")
        assert job.prompt is not None
        assert isinstance(job.receiver, EmbeddingReceiver)
        self._schedule(job, job.prompt, TransferSource(job.receiver, self.model.fields, lambda: job.hold.set(0)))

    def _transferred(self, job: Job) -> None:
        if "arrived" not in job.marks:  # all of it has come since the arriving ones were looked at
            self._arrived(job)
        job.mark("transferred")
        self.metrics.transferred(job)
        if job.receiver is not None:
            self._tell_progress(job, job.receiver.total_embedding_length)

    def _tell_progress(self, job: Job, tokens: int) -> None:
        if (event := job.progress(tokens)) is not None:
            job.deliver(event)

    def step(self) -> bool:
        """Runs one scheduler step for every sequence that can continue; returns false if none can."""
        if not self.scheduler.runnable():
            return False
        for output in self.scheduler.step():
            job = self.jobs.get(output.request_id)
            if job is not None:  # None: the job has ended with an error of its transfer
                self.guard(job, self._deliver, job, output)
        return True

    def _schedule(self, job: Job, prompt: Prompt, source: EmbeddingSource | None = None) -> None:
        assert job.built is not None
        job.mark("scheduled")
        built, client = job.built, job.request.client
        self.scheduler.add(Request(job.id, prompt, built.params, source, built.matcher, client))

    def _deliver(self, job: Job, output: Output) -> None:
        if output.error is not None:
            self._fail(job, output.error)
            return
        if output.token is not None:
            if "first_token" not in job.marks:
                job.mark("first_token")
                self.metrics.ttft.observe(job.seconds_to("first_token") or 0.0)
            job.deliver(self._token_event(output))
        if output.finish_reason is not None:
            job.finish_reasons[output.choice] = output.finish_reason
        if output.is_last:
            job.mark("ended")
            self.advance_transfers()  # counts a transfer that has just ended, before the job is gone
            if job.id in self.jobs:
                end = job.end_event(output)
                self._remove(job)
                self.metrics.finished(output)
                job.deliver(end)

    def _token_event(self, output: Output) -> dict[str, Any]:
        """Returns the event of a token: with its choice if that is not the first, and with its log probability."""
        event: dict[str, Any] = {"type": "token", "text": output.text, "token_id": output.token}
        event |= {"choice": output.choice} if output.choice else {}
        if output.logprobs is not None and output.token is not None:
            text_of = self.model.prompts.text_of
            event["piece"], event["logprob"] = text_of([output.token]), output.logprobs.chosen
            event["top"] = [[text_of([token]), value] for token, value in output.logprobs.top]
        return event

    def _on_failure(self, request: MultimodalLanguageRequest, error: EmbeddingTransferError) -> None:
        self._fail(request.req, error)

    def _fail(self, job: Job, error: Exception) -> None:
        """Ends a job with an error, unless it has ended. Never raises."""
        if job.id not in self.jobs:
            return
        serve_error = as_serve_error(error)
        self._remove(job)
        self.metrics.failed.labels(serve_error.code).inc()
        if (failed := attempt(job.deliver, serve_error)) is not None:
            log.error("an error could not be delivered", exc_info=failed)

    def _remove(self, job: Job) -> None:
        """Removes a job from every stage. Its blocks go back to the pool as soon as they are drained. Never raises."""
        del self.jobs[job.id]
        steps: list[Callable[[], object]] = [partial(self.scheduler.abort, job.id)]
        steps += [partial(queue.abort, job) for queue in (self.prealloc_queue, self.transfer_queue)]
        if job.receiver is not None:
            steps.append(job.receiver.clear)
        elif job.sink is not None:
            steps.append(job.sink.drop)
        steps += [] if job.building is None else [job.building.cancel]
        for step in steps:
            if (failed := attempt(step)) is not None:
                log.error("a job could not be removed everywhere", exc_info=failed)


def _kept_folder(settings: LanguageSettings, manager: ReceivingManager) -> KeptFolder | None:
    """Returns the folder for embeddings under way; None if there is to be none."""
    if settings.kept_folder is None or not settings.kept_bytes or not isinstance(manager, ReceiveManager):
        return None
    return KeptFolder(settings.kept_folder, settings.kept_bytes, manager.geometry.layout)


def _changed(job: Job, wake: Callable[[], None]) -> None:
    """Tells of a change of a job's transfer. Runs on the driver thread, without a lock of the manager."""
    job.note_arrival()
    wake()
