"""One request of a language worker: its state, its timing and its events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from embferry.disaggregation.queues import ReceivingEnd
from embferry.engine.prompt import Prompt
from embferry.engine.scheduler import Output
from embferry.kept.sink import KeptSink
from embferry.protocol.errors import EmbeddingTransferError
from embferry.serve.byte_budget import Hold
from embferry.serve.errors import ServeError
from embferry.serve.language.job_trace import JobTrace
from embferry.serve.language.messages import GenerateRequest
from embferry.serve.language.prompting import Built
from embferry.transfer.receive_handle import EmbeddingReceiver

Event = ServeError | dict[str, Any]
ACCEPTED: Event = {"type": "accepted"}
"""The first event of a job whose prompt is valid; not sent. Token events, the end event or an error follow."""
PROGRESS_SECONDS = 0.25
"""Seconds between two events about the embedding of a job, at least; the last one does not wait."""


@dataclass(eq=False)
class Job:
    """A request on its way through the worker.

    Attributes:
        id: unique within the worker; the router's request ids may repeat.
        deliver: called on the engine thread with ``ACCEPTED``, then the token events, then one end event. An error
            may come at any point and is the last event. It must not block.
        building: prompt, parameters and grammar, which are built on a thread of their own.
        built: the same, from then on.
        prompt: the prompt of these.
        finish_reasons: why each choice has ended, by its number.
        hold: the bytes that the job holds, counted against ``language.max_held_bytes``.
        marks: the time at which the job reached each stage, in monotonic seconds.
        sink: where the embedding goes; None: to ordinary memory.
        told: the tokens of the embedding of which the caller knows, and the time at which it was told.
        trace: its spans; None unless they are wanted.
    """

    id: str
    request: GenerateRequest
    deliver: Callable[[Event], None]
    hold: Hold
    building: Future[Built] | None = None
    built: Built | None = None
    prompt: Prompt | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    receiver: ReceivingEnd | None = None
    sink: KeptSink | None = None
    marks: dict[str, float] = field(default_factory=lambda: {"submitted": time.monotonic()})
    told: tuple[int, float] = (0, 0.0)
    trace: JobTrace | None = None

    @property
    def is_watched(self) -> bool:
        """Whether the times at which the embedding arrives are of interest."""
        return self.request.progress or self.trace is not None

    def mark(self, name: str) -> None:
        """Records the time of a stage, unless it is recorded already."""
        self.marks.setdefault(name, time.monotonic())

    def seconds_to(self, name: str) -> float | None:
        """Returns the seconds from the request to a stage, or None if the job has not reached it."""
        return round(self.marks[name] - self.marks["submitted"], 6) if name in self.marks else None

    def transfer(self) -> dict[str, Any] | None:
        """Returns the field ``transfer`` of the end event; None without an embedding.

        ``kept_tokens``: tokens that a killed worker had received and that were not sent again.
        """
        receiver = self.receiver
        if receiver is None:
            return None
        tokens = receiver.total_embedding_length
        kept = receiver.kept_tokens if isinstance(receiver, EmbeddingReceiver) else 0
        return ({"kept_tokens": kept} if kept else {}) | {
            "total_tokens": tokens,
            "initial": min(1, receiver.transfers),
            "resumed": max(0, receiver.transfers - 1),
            "bytes": tokens * receiver.manager.geometry.layout.token_bytes,
            "transport": receiver.transport,
        }

    def progress(self, tokens: int) -> dict[str, Any] | None:
        """Returns the event that so many tokens of the embedding have arrived; None if it is not wanted now.

        An event follows the one before after ``PROGRESS_SECONDS``, the last one at once. That one has the ``seconds``
        from the first token to the last, and how many seconds ``ago`` that was.
        """
        transfer, now = self.transfer() if self.request.progress else None, time.monotonic()
        if transfer is None or transfer["total_tokens"] < 0:
            return None
        is_last = "transferred" in self.marks
        if not is_last and (tokens <= self.told[0] or now - self.told[1] < PROGRESS_SECONDS):
            return None
        self.told = tokens, now
        grants = transfer.pop("initial") + transfer.pop("resumed")
        transfer.pop("kept_tokens", None)
        event = {"type": "progress", "tokens": tokens, "transfers": grants, **transfer}
        if is_last:
            last = self.marks.get("last_token_here", now)
            spent = last - self.marks.get("first_token_here", last)
            event |= {"seconds": round(max(0.0, spent), 6), "ago": round(max(0.0, now - last), 6)}
        return event

    def note_arrival(self) -> None:
        """Notes the times of the first and of the last token of the embedding, when the transfer has changed.

        The engine thread, which may be in a long step, would see them later. Runs on the driver thread; never raises.
        """
        receiver = self.receiver
        with contextlib.suppress(EmbeddingTransferError):
            if receiver is not None and receiver.transferred_tokens:
                self.mark("first_token_here")
                if self.trace is not None:
                    self.trace.transfers(receiver.transfers)
                if receiver.transferred_tokens == receiver.total_embedding_length:
                    self.mark("last_token_here")

    def end_trace(self, last: Event) -> None:
        """Makes the spans of a job that ends with this event."""
        if self.trace is None:
            return
        if isinstance(last, ServeError):
            self.trace.end(self.marks, self.transfer(), last.code, 0)
        else:
            self.trace.end(self.marks, last["transfer"], "", last["usage"]["completion_tokens"])

    def timing(self) -> dict[str, float]:
        """Returns the field ``timing`` of the end event: seconds from the request to each stage that was reached."""
        names = {"first_arrival": "arrived", "transferred": "transferred", "ttft": "first_token", "total": "ended"}
        spans = {name: self.seconds_to(mark) for name, mark in names.items()}
        return {name: span for name, span in spans.items() if span is not None}

    def end_event(self, output: Output) -> dict[str, Any]:
        """Returns the last event of a finished answer."""
        prompt, completion = output.usage.prompt_tokens, output.usage.completion_tokens
        reasons = [reason for _, reason in sorted(self.finish_reasons.items())]
        several = {"finish_reasons": reasons} if len(reasons) > 1 else {}
        return several | {
            "type": "end",
            "finish_reason": output.finish_reason,
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
            "transfer": self.transfer(),
            "timing": self.timing(),
        }
