"""Runs many requests in turn on one language model, and reads their visual tokens from transfers.

``step`` never waits. It runs one chunk or one token of every sequence that can go on. So a missing embedding delays
only its own request, and a long prompt delays the others by one chunk at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch

from embferry.engine.choice import Logprobs
from embferry.engine.embedding import Embedding
from embferry.engine.errors import EmbeddingMismatch, QueueFull
from embferry.engine.grammar import Matcher
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
        source: Provides its visual tokens; None if there are none.
        matcher: The grammar that the answer must match; None: any text.
        client: Its sender. Of those that wait, the client with the fewest running sequences is next.
    """

    id: str
    prompt: Prompt
    params: SamplingParams
    source: EmbeddingSource | None = None
    matcher: Matcher | None = None
    client: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens of a request. The visual tokens are part of the prompt's."""

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Output:
    """One token of a choice of a request, or the request's end.

    Attributes:
        token: The id of the token; None if the request ended without one.
        text: The text that became final with this token; may be empty.
        usage: Tokens of the request so far, in all of its choices.
        finish_reason: Set only on the last output of a choice; "abort" and "error" end all choices.
        error: The error, if the reason is "error".
        ttft: Seconds from ``add`` to the first token; set on the output with the first token and on the last one.
        choice: The number of the choice.
        is_last: Whether it is the last output of the request.
        logprobs: The log probabilities of the token, if the request asks for them.
    """

    request_id: str
    token: int | None
    text: str
    usage: Usage
    finish_reason: Ending | None = None
    error: Exception | None = None
    ttft: float | None = None
    choice: int = 0
    is_last: bool = False
    logprobs: Logprobs | None = None


@dataclass(slots=True, eq=False)
class _Running:
    """A request. ``sequences``: its first choice from its start on; the others too, once the first has a token."""

    request: Request
    added_at: float
    sequences: list[Sequence] = field(default_factory=list)
    ttft: float | None = None

    @property
    def first(self) -> Sequence | None:
        return self.sequences[0] if self.sequences else None

    @property
    def unfinished(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]


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
        if len(self._queue) >= self.max_queued and not self._fits(request):
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
        outputs = [self._end(running, "abort") for running in self._aborted.values()]
        self._aborted.clear()
        for running in list(self._running.values()):
            outputs += self._advance(running)
        self._admit()
        return outputs

    def _admit(self) -> None:
        """Begins with the next requests, as many as have room with all of their choices; at least one."""
        while self._queue:
            running: Counter[str] = Counter()
            for one in self._running.values():
                running[one.request.client] += one.request.params.n
            chosen = min(self._queue, key=lambda id: running[self._queue[id].request.client])  # the first of several
            if not self._fits(self._queue[chosen].request):
                return
            self._running[chosen] = self._queue.pop(chosen)

    def _fits(self, request: Request) -> bool:
        taken = sum(running.request.params.n for running in self._running.values())
        return not taken or taken + request.params.n <= self.max_running

    def _ready(self, running: _Running) -> bool:
        """Returns whether a step can advance the request. A failed source counts as ready: its request can end."""
        try:
            return self._arrived(running)
        except Exception:  # noqa: BLE001 - a source may raise any error; the next step reports it
            return True

    def _arrived(self, running: _Running) -> bool:
        """Returns whether the next chunk's visual tokens have arrived, after comparing the source with the prompt."""
        sequence, source = running.first, running.request.source
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

    def _advance(self, running: _Running) -> list[Output]:
        """Runs one chunk, or one token of every choice. Returns the outputs of the new tokens."""
        try:
            advanced = self._work(running)
        except Exception as error:  # noqa: BLE001 - an error in one request ends that request only
            del self._running[running.request.id]
            return [self._end(running, "error", error)]
        if advanced and running.ttft is None:
            running.ttft = self._clock() - running.added_at
        is_over = bool(advanced) and not running.unfinished
        if is_over:
            del self._running[running.request.id]
        return [self._output(running, one, is_over and one is advanced[-1]) for one in advanced]

    def _work(self, running: _Running) -> list[Sequence]:
        """Runs one chunk or one token, if the visual tokens it needs have arrived. Returns what has a new token."""
        request = running.request
        if running.first is None:
            running.sequences.append(self.model.start(request.prompt, request.params, request.matcher))
        sequence = running.sequences[0]
        if not self._arrived(running):
            return []
        if sequence.prefilled:
            advanced = running.unfinished
            for one in advanced:
                self.model.decode_step(one)
            return advanced
        if not self._prefill(request, sequence):
            return []
        running.sequences += self.model.fork(sequence)
        return list(running.sequences)

    def _prefill(self, request: Request, sequence: Sequence) -> bool:
        """Runs the next chunk. Returns whether it was the last, so that there is a token."""
        first, last = sequence.next_visual_range
        if request.source is None or last == first:
            return self.model.prefill_chunk(sequence) is not None
        fields = {field.name: request.source.read(field.name, first, last) for field in self.model.fields}
        token = self.model.prefill_chunk(sequence, fields)
        request.source.release(last)
        return token is not None

    def _output(self, running: _Running, sequence: Sequence, is_last: bool) -> Output:
        """Returns the output of the newest token of a choice."""
        ttft = running.ttft if is_last or len(sequence.tokens) == 1 else None
        return Output(
            running.request.id,
            sequence.tokens[-1],
            sequence.take_text(),
            self._usage(running),
            sequence.finish_reason,
            ttft=ttft,
            choice=sequence.number,
            is_last=is_last,
            logprobs=sequence.logprobs,
        )

    def _end(self, running: _Running, reason: Ending, error: Exception | None = None) -> Output:
        """Returns the last output of a request that ends without a token."""
        text = running.sequences[0].take_text() if running.sequences else ""
        return Output(running.request.id, None, text, self._usage(running), reason, error, running.ttft, is_last=True)

    def _usage(self, running: _Running) -> Usage:
        prompt, tokens = running.request.prompt, sum(len(sequence.tokens) for sequence in running.sequences)
        return Usage(prompt.length, prompt.num_visual, tokens)
