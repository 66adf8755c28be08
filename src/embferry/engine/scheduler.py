"""Runs many requests in turn on one language model, and reads their visual tokens from transfers.

``step`` never waits. It runs one chunk or one token of every sequence that can go on. So a missing embedding delays
only its own request, and a long prompt delays the others by one chunk at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from embferry.engine.embedding import Embedding
from embferry.engine.errors import EmbeddingMismatch, QueueFull
from embferry.engine.language import LanguageModel, Sequence
from embferry.engine.prompt import Prompt, stream_digest
from embferry.engine.sampling import SamplingParams

Ending = Literal["stop", "length", "abort", "error"]


class EmbeddingSource(Protocol):
    """The stream of a prompt's visual tokens, of which a prefix has arrived.

    Neither ``release`` nor the end of a request closes the source; that is up to its owner.
    """

    @property
    def total_tokens(self) -> int:
        """Length of the stream in tokens; -1 while unknown."""

    def available_tokens(self) -> int:
        """Returns the number of tokens of the verified prefix. Does not block.

        Raises:
            Exception: The transfer has failed; the error is the transfer's.
        """

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        """Returns tokens ``[start, stop)`` of a field, ``[stop - start, width]``: a copy, or a view until released."""

    def release(self, upto: int) -> None:
        """Releases the tokens below ``upto``; they are not read again."""


@runtime_checkable
class DigestedSource(Protocol):
    """A source that knows the digest of its content. The scheduler compares it with the prompt's."""

    @property
    def digest(self) -> bytes:
        """``stream_digest`` of the items' digests; empty while unknown."""


class ResidentSource:
    """A source whose tokens are all there from the start."""

    def __init__(self, *embeddings: Embedding) -> None:
        self._fields = {
            name: torch.cat([embedding.tensors[name] for embedding in embeddings]) for name in embeddings[0].tensors
        }
        self.digest = stream_digest([embedding.shape.digest for embedding in embeddings])
        self.total_tokens = len(self._fields["input_embeddings"])

    def available_tokens(self) -> int:
        return self.total_tokens

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        return self._fields[field][start:stop]

    def release(self, upto: int) -> None:
        """Does nothing: the tokens are the caller's."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt to answer.

    Attributes:
        source: provides its visual tokens; None if there are none.
        client: its sender. Of those that wait, the client with the fewest running requests is next.
    """

    id: str
    prompt: Prompt
    params: SamplingParams
    source: EmbeddingSource | None = None
    client: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens of a request. The visual tokens are part of the prompt's."""

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Output:
    """One token of a request, or its end.

    Attributes:
        token: The id of the token; None if the request ended without one.
        text: The text that became final with this token; may be empty.
        usage: Tokens of the request so far.
        finish_reason: Set only on the last output of a request.
        error: The error, if the reason is "error".
        ttft: Seconds from ``add`` to the first token; set on the output with the first token and on the last one.
    """

    request_id: str
    token: int | None
    text: str
    usage: Usage
    finish_reason: Ending | None = None
    error: Exception | None = None
    ttft: float | None = None


@dataclass(slots=True, eq=False)
class _Running:
    request: Request
    added_at: float
    sequence: Sequence | None = None
    ttft: float | None = None


class Scheduler:
    """Runs requests on a model. All methods are called from one thread.

    Args:
        model: The model.
        max_running: Most sequences with a key-value cache at the same time; further requests wait in order.
        max_queued: Most requests that may wait.
        clock: Returns monotonic time in seconds.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_running: int = 16,
        max_queued: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.max_running = max_running
        self.max_queued = max_queued
        self._clock = clock
        self._queue: dict[str, _Running] = {}
        self._running: dict[str, _Running] = {}
        self._aborted: dict[str, _Running] = {}

    def __len__(self) -> int:
        """Returns the number of requests whose last output has not been returned."""
        return len(self._queue) + len(self._running) + len(self._aborted)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def add(self, request: Request) -> None:
        """Adds a request.

        Raises:
            QueueFull: As many requests as possible run and wait already.
            ValueError: The id is in use, or the prompt has media and no source.
        """
        if any(request.id in each for each in (self._queue, self._running, self._aborted)):
            raise ValueError(f"a request with id {request.id!r} is not finished")
        if request.prompt.num_visual and request.source is None:
            raise ValueError(f"request {request.id!r} has media but no source of their embeddings")
        if len(self._running) >= self.max_running and len(self._queue) >= self.max_queued:
            raise QueueFull(f"{self.max_running} requests are running and {self.max_queued} waiting; try again later")
        self._queue[request.id] = _Running(request, self._clock())
        self._admit()

    def abort(self, request_id: str) -> bool:
        """Ends a request; the next step returns its last output. Returns False if there is no such request."""
        found = self._running.pop(request_id, None) or self._queue.pop(request_id, None)
        if found is not None:
            self._aborted[request_id] = found
        return found is not None

    def runnable(self) -> bool:
        """Returns whether a step has work. If not, the caller should wait until a source has more tokens."""
        return bool(self._aborted) or any(self._ready(running) for running in self._running.values())

    def step(self) -> list[Output]:
        """Runs one chunk or token of every sequence that can go on; returns the new outputs, which may be none."""
        outputs: list[Output | None] = [self._output(running, "abort") for running in self._aborted.values()]
        self._aborted.clear()
        outputs += [self._advance(running) for running in list(self._running.values())]
        self._admit()
        return [output for output in outputs if output is not None]

    def _admit(self) -> None:
        while self._queue and len(self._running) < self.max_running:
            running = Counter(one.request.client for one in self._running.values())
            chosen = min(self._queue, key=lambda id: running[self._queue[id].request.client])  # the first of several
            self._running[chosen] = self._queue.pop(chosen)

    def _ready(self, running: _Running) -> bool:
        """Returns whether a step can advance the request. A failed source counts as ready: its request can end."""
        try:
            return self._arrived(running)
        except Exception:  # noqa: BLE001 - a source may raise any error; the next step reports it
            return True

    def _arrived(self, running: _Running) -> bool:
        """Returns whether the next chunk's visual tokens have arrived, after comparing the source with the prompt."""
        sequence, source = running.sequence, running.request.source
        if sequence is None or sequence.prefilled or source is None:
            return True
        prompt = running.request.prompt
        if source.total_tokens not in (-1, prompt.num_visual):
            raise EmbeddingMismatch(
                f"the embedding has {source.total_tokens} tokens, the media of the prompt have {prompt.num_visual}"
            )
        if isinstance(source, DigestedSource) and source.digest and prompt.digest not in (b"", source.digest):
            raise EmbeddingMismatch(
                f"the embedding's content ({source.digest.hex()}) is not that of the prompt ({prompt.digest.hex()})"
            )
        # Called even if the next chunk is all text, so that a failed transfer ends its request at once.
        return source.available_tokens() >= sequence.next_visual_range[1]

    def _advance(self, running: _Running) -> Output | None:
        try:
            token = self._work(running)
        except Exception as error:  # noqa: BLE001 - an error in one request ends that request only
            del self._running[running.request.id]
            return self._output(running, "error", error)
        if token is None or running.sequence is None:
            return None
        if running.ttft is None:
            running.ttft = self._clock() - running.added_at
        if running.sequence.finish_reason is not None:
            del self._running[running.request.id]
        return self._output(running, running.sequence.finish_reason)

    def _work(self, running: _Running) -> int | None:
        """Runs one chunk or one token, if the visual tokens it needs have arrived. Returns the new token, if any."""
        request = running.request
        if running.sequence is None:
            running.sequence = self.model.start(request.prompt, request.params)
        sequence = running.sequence
        if not self._arrived(running):
            return None
        if sequence.prefilled:
            return self.model.decode_step(sequence)
        first, last = sequence.next_visual_range
        if request.source is None or last == first:
            return self.model.prefill_chunk(sequence)
        fields = {field.name: request.source.read(field.name, first, last) for field in self.model.fields}
        token = self.model.prefill_chunk(sequence, fields)
        request.source.release(last)
        return token

    def _output(self, running: _Running, reason: Ending | None, error: Exception | None = None) -> Output:
        """Returns the output of the newest token, or the last output if there is a reason for the end."""
        prompt, sequence = running.request.prompt, running.sequence
        tokens = sequence.tokens if sequence is not None else []
        text = sequence.take_text() if sequence is not None else ""
        usage = Usage(prompt.length, prompt.num_visual, len(tokens))
        token = tokens[-1] if reason not in ("abort", "error") else None
        ttft = running.ttft if reason is not None or len(tokens) == 1 else None
        return Output(running.request.id, token, text, usage, reason, error, ttft)
