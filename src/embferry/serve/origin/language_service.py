"""The jobs of a language worker that receives whole prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from embferry.disaggregation.mooncake.conn_multimodal import LanguageManager
from embferry.disaggregation.queues import ReceivingEnd
from embferry.engine.embedding import from_bytes
from embferry.engine.errors import EmbeddingMismatch, PromptTooLong
from embferry.engine.prompt import Prompt
from embferry.engine.whole_prompt import prompt_of_rows
from embferry.protocol.layout import Field
from embferry.serve.language.job import Job
from embferry.serve.language.pipeline import JobPipeline
from embferry.serve.language.service import LanguageService
from embferry.transfer.fields import Fields

DELTA = 1
"""Index of the mrope position delta in ``aux_datas``."""


class Rows:
    """An :class:`~embferry.engine.scheduler.EmbeddingSource` of rows that have arrived.

    Args:
        fields: The model's.
        rows: Field name → uint8 ``[length, bytes of a row]``.
        released: Called when the last row has been read.
    """

    def __init__(self, fields: Sequence[Field], rows: Fields, released: Callable[[], None]) -> None:
        self.tensors = {field.name: from_bytes(field, rows[field.name]) for field in fields}
        self.total_tokens = len(self.tensors["fill_ids"])
        self._released = released

    def available_tokens(self) -> int:
        return self.total_tokens

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[field][start:stop]

    def release(self, upto: int) -> None:
        if upto >= self.total_tokens:
            self.tensors.clear()
            self._released()


class OriginPipeline(JobPipeline):
    """Receives the rows of every prompt, also of those without media, and then runs the model on them.

    The prompt that is built of the texts only tells how long it would be without media.
    """

    def _receives(self, prompt: Prompt) -> bool:
        return True

    def _open(self, job: Job, prompt: Prompt) -> ReceivingEnd:
        room, address = job.request.room, job.request.endpoint
        assert room is not None, "the endpoint checks it"
        assert address is not None, "the endpoint checks it"
        assert isinstance(self.manager, LanguageManager)
        return self.manager.open(room, address)

    def _arrived(self, job: Job) -> None:
        """Counts the memory that the rows take: their number is known now. The model waits for all of them."""
        job.mark("arrived")
        assert job.receiver is not None
        job.hold.add(job.receiver.total_embedding_length * job.receiver.manager.geometry.layout.token_bytes)

    def _transferred(self, job: Job) -> None:
        super()._transferred(job)
        receiver, texts = job.receiver, job.prompt
        assert receiver is not None
        assert texts is not None
        rows = Rows(self.model.fields, receiver.arrays(), lambda: job.hold.set(0))
        receiver.clear()  # the rows are the job's now
        length, room, delta = rows.total_tokens, job.request.room, int(receiver.aux[DELTA])
        if length < texts.length:
            why = f"the embedding has {length} tokens, fewer than the {texts.length} of the prompt's texts"
            raise EmbeddingMismatch(f"{why}; are both sides asked the same, with the same chat template (room {room})?")
        answer = job.request.sampling.max_tokens or 1
        most = min(self.model.prompts.limit - answer, self.limits.max_prompt_tokens)
        if length > most:
            raise PromptTooLong(f"the prompt has {length} tokens with its media; at most {most} fit with the answer")
        self._schedule(job, prompt_of_rows(rows.tensors, delta, is_text=length == texts.length), rows)


class OriginLanguageService(LanguageService):
    """Runs the model on whole prompts."""

    pipeline: ClassVar[type[JobPipeline]] = OriginPipeline

    def abort_request(self, rid: str) -> None:
        """Ends the jobs of a request of the load balancer."""
        with self._idle:
            found = [job for job in self._open.values() if job.request.request_id == rid]
        for job in found:
            self.abort(job)
