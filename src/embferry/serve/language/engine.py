"""The model's scheduler and the transfer's queues, moved on together.

begin --room--> PreallocQueue --> TransferQueue --first tokens are here--> scheduler: waiting, running --> end
      --text alone-------------------------------------------------------^
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from embferry.disaggregation.multimodal_language import (
    EmbeddingTransferError,
    MultimodalLanguagePreallocQueue,
    MultimodalLanguageRequest,
    MultimodalLanguageTransferQueue,
)
from embferry.engine.errors import ParameterError, PromptTooLong
from embferry.engine.language import LanguageModel
from embferry.engine.prompt import Prompt
from embferry.engine.scheduler import Output, Request, Scheduler
from embferry.protocol.errors import Aborted, PeerGone
from embferry.serve.config import Settings
from embferry.serve.language.job import Accepted, Job, end_event, token_event
from embferry.serve.language.metrics import LanguageMetrics
from embferry.serve.language.source import TransferSource
from embferry.serve.language.wire import GenerateRequest
from embferry.serve.worker.errors import as_serve_error
from embferry.transfer.receive_manager import ReceiveManager

log = logging.getLogger(__name__)


class Engine:
    """Used from one thread. ``changed`` may be called from any."""

    def __init__(
        self, model: LanguageModel, manager: ReceiveManager, settings: Settings, metrics: LanguageMetrics
    ) -> None:
        self.model = model
        self.manager = manager
        self.limits = settings.language
        self.metrics = metrics
        # How many may be here at all is the service's business: whoever was let in is not refused later.
        most = self.limits.max_concurrent + self.limits.max_queued
        self.scheduler = Scheduler(model, max_running=self.limits.max_concurrent, max_queued=most)
        self.prealloc = MultimodalLanguagePreallocQueue(self._failed)
        self.transfer = MultimodalLanguageTransferQueue(self._failed)
        self.jobs: dict[str, Job] = {}

    def begin(self, job: Job, wake: Callable[[], None]) -> None:
        """Makes the prompt and asks for the embedding. What is wrong with the request is its only event then."""
        self.jobs[job.id] = job
        try:
            job.prompt = self._prompt(job.request)
            if job.prompt.num_visual:
                self._ask(job, wake)
            else:
                self._schedule(job)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one request ends that request, with its error
            self._fail(job, error)
            return
        job.deliver(Accepted())

    def abort(self, job: Job) -> None:
        """Ends a job that has not ended; does nothing to one that has."""
        if job.id in self.jobs:
            self.metrics.aborted.inc()
            self._fail(job, Aborted("aborted by the caller", room=job.request.room))

    def shut_down(self) -> None:
        """Ends every job."""
        for job in list(self.jobs.values()):
            self._fail(job, PeerGone("the language worker is shutting down; ask again", room=job.request.room))

    def move(self) -> None:
        """Takes over what has happened to the transfers."""
        for request in self.prealloc.pop_preallocated():
            self.transfer.add(request)
        for request in self.transfer.pop_arriving():
            job: Job = request.req
            job.mark("arrived")
            self._schedule(job)
        for request in self.transfer.pop_transferred():
            request.req.mark("transferred")
            self.metrics.transferred(request.req)

    def step(self) -> bool:
        """One piece of work for every sequence that can go on; False if none can."""
        if not self.scheduler.runnable():
            return False
        for output in self.scheduler.step():
            job = self.jobs.get(output.request_id)
            if job is not None:  # else it has ended already, with an error of its transfer
                self._put(job, output)
        return True

    def _prompt(self, request: GenerateRequest) -> Prompt:
        params = request.sampling.params
        if params.max_tokens > self.limits.max_new_tokens:
            most = f"{self.limits.max_new_tokens} (language.max_new_tokens)"
            raise ParameterError(f"max_tokens is {params.max_tokens}; an answer may have at most {most}")
        prompt = self.model.prompts.build(request.chat, request.shapes, params.max_tokens)
        if prompt.length > self.limits.max_prompt_tokens:
            most = f"{self.limits.max_prompt_tokens} (language.max_prompt_tokens)"
            raise PromptTooLong(f"the prompt has {prompt.length} tokens; at most {most} are taken")
        return prompt

    def _ask(self, job: Job, wake: Callable[[], None]) -> None:
        room, endpoint = job.request.room, job.request.endpoint
        assert room is not None, "the wire's own rule"
        assert endpoint is not None, "the wire's own rule"
        job.receiver = self.manager.open(room, endpoint)
        job.receiver.on_change(wake)
        self.prealloc.add(job, job.receiver)

    def _schedule(self, job: Job) -> None:
        assert job.prompt is not None
        source = None if job.receiver is None else TransferSource(job.receiver, self.model.fields)
        self.scheduler.add(Request(job.id, job.prompt, job.request.sampling.params, source))

    def _put(self, job: Job, output: Output) -> None:
        if output.error is not None:
            self._fail(job, output.error)
            return
        if output.token is not None:
            if "first_token" not in job.marks:
                job.mark("first_token")
                self.metrics.ttft.observe(job.since("submitted", "first_token") or 0.0)
            job.deliver(token_event(output))
        if output.finish_reason is not None:
            job.mark("ended")
            self.move()  # a transfer that has just ended is counted, and leaves its queue
            if job.id in self.jobs:
                self._forget(job)
                self.metrics.finished(job, output)
                job.deliver(end_event(job, output))

    def _failed(self, request: MultimodalLanguageRequest, error: EmbeddingTransferError) -> None:
        if request.req.id in self.jobs:
            self._fail(request.req, error)

    def _fail(self, job: Job, error: Exception) -> None:
        said = as_serve_error(error)
        self._forget(job)
        self.metrics.failed.labels(said.code).inc()
        job.deliver(said)

    def _forget(self, job: Job) -> None:
        """Lets go of everything the job has anywhere. Blocks go back to the pool as soon as they are drained."""
        del self.jobs[job.id]
        self.scheduler.abort(job.id)
        for queue in (self.prealloc, self.transfer):
            queue.abort(job)
        if job.receiver is not None:
            job.receiver.clear()
