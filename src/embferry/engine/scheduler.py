"""Runs many requests in turn on one language model, and reads their visual tokens from transfers.

``step`` never waits. It runs one chunk or one token of every sequence that can go on. So a missing embedding delays
only its own request, and a long prompt delays the others by one chunk at a time.
"""

from __future__ import annotations

import time
from collections import deque
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
        fields = [embedding.tensors() for embedding in embeddings]
        self._fields = {name: torch.cat([each[name] for each in fields]) for name in fields[0]}
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
    """A prompt to answer. The source provides its visual tokens; it is None if there are none."""

    id: str
    prompt: Prompt
    params: SamplingParams
    source: EmbeddingSource | None = None


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
    given: int = 0


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
        self._queue: deque[_Running] = deque()
        self._running: dict[str, _Running] = {}
        self._aborted: list[_Running] = []

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
        known = (*self._running.values(), *self._queue, *self._aborted)
        if any(request.id == other.request.id for other in known):
            raise ValueError(f"a request with id {request.id!r} is not finished")
        if request.prompt.num_visual and request.source is None:
            raise ValueError(f"request {request.id!r} has media but no source of their embeddings")
        if len(self._running) >= self.max_running and len(self._queue) >= self.max_queued:
            raise QueueFull(f"{self.max_running} requests are running and {self.max_queued} waiting; try again later")
        self._queue.append(_Running(request, self._clock()))
        self._admit()

    def abort(self, request_id: str) -> bool:
        """Ends a request; the next step returns its last output. Returns False if there is no such request."""
        running = self._running.pop(request_id, None)
        if running is None:
            running = next((waiting for waiting in self._queue if waiting.request.id == request_id), None)
            if running is None:
                return False
            self._queue.remove(running)
        self._aborted.append(running)
        return True

    def runnable(self) -> bool:
        """Returns whether a step has work. If not, the caller should wait until a source has more tokens."""
        return bool(self._aborted) or any(self._ready(running) for running in self._running.values())

    def step(self) -> list[Output]:
        """Runs one chunk or token of every sequence that can go on; returns the new outputs, which may be none."""
        outputs: list[Output | None] = [self._last(running, "abort") for running in self._aborted]
        self._aborted.clear()
        outputs += [self._advance(running) for running in list(self._running.values())]
        self._admit()
        return [output for output in outputs if output is not None]

    def _admit(self) -> None:
        while self._queue and len(self._running) < self.max_running:
            running = self._queue.popleft()
            self._running[running.request.id] = running

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
            self._work(running)
        except Exception as error:  # noqa: BLE001 - an error in one request ends that request only
            del self._running[running.request.id]
            return self._last(running, "error", error)
        sequence = running.sequence
        if sequence is None or len(sequence.tokens) == running.given:
            return None
        first = running.given == 0
        if first:
            running.ttft = self._clock() - running.added_at
        running.given += 1
        if sequence.finish_reason is not None:
            del self._running[running.request.id]
            return self._last(running, sequence.finish_reason)
        ttft = running.ttft if first else None
        text = sequence.take_text()
        return Output(running.request.id, sequence.tokens[-1], text, self._usage(running), ttft=ttft)

    def _work(self, running: _Running) -> None:
        """Runs one chunk or one token, if the visual tokens it needs have arrived."""
        request = running.request
        if running.sequence is None:
            running.sequence = self.model.start(request.prompt, request.params)
        sequence = running.sequence
        if not self._arrived(running):
            return
        if sequence.prefilled:
            self.model.decode_step(sequence)
            return
        first, last = sequence.next_visual_range
        if request.source is None or last == first:
            self.model.prefill_chunk(sequence)
            return
        fields = {spec.name: request.source.read(spec.name, first, last) for spec in self.model.fields}
        self.model.prefill_chunk(sequence, fields)
        request.source.release(last)

    def _last(self, running: _Running, reason: Ending, error: Exception | None = None) -> Output:
        sequence = running.sequence
        token = sequence.tokens[-1] if sequence is not None and reason in ("stop", "length") else None
        text = sequence.take_text() if sequence is not None else ""
        return Output(running.request.id, token, text, self._usage(running), reason, error, running.ttft)

    def _usage(self, running: _Running) -> Usage:
        prompt, sequence = running.request.prompt, running.sequence
        return Usage(prompt.length, prompt.num_visual, len(sequence.tokens) if sequence is not None else 0)
