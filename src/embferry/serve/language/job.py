"""One request on its way through a language worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from embferry.engine.prompt import Prompt
from embferry.engine.scheduler import Output
from embferry.serve.errors import ServeError
from embferry.serve.language.wire import GenerateRequest
from embferry.transfer.receive_handle import EmbeddingReceiver


@dataclass(frozen=True, slots=True)
class Accepted:
    """The prompt is made and the request is in the queue: what comes next are events, or an error among them."""


Event = Accepted | ServeError | dict[str, Any]


@dataclass(eq=False)
class Job:
    """``deliver`` is called from the engine's thread: with :class:`Accepted`, then token events, then one end event; or
    with an error at any point, which is then the last.

    Attributes:
        id: unique within the worker; clients' own ids may repeat.
        marks: when it got how far, monotonic seconds.
    """

    id: str
    request: GenerateRequest
    deliver: Callable[[Event], None]
    prompt: Prompt | None = None
    receiver: EmbeddingReceiver | None = None
    marks: dict[str, float] = field(default_factory=lambda: {"submitted": time.monotonic()})

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.monotonic())

    def since(self, start: str, end: str) -> float | None:
        """Seconds from one mark to another, or None if one was not passed."""
        if start not in self.marks or end not in self.marks:
            return None
        return round(self.marks[end] - self.marks[start], 6)

    def transfer(self) -> dict[str, Any] | None:
        """What was transferred, and how; None without an embedding."""
        receiver = self.receiver
        if receiver is None:
            return None
        tokens = receiver.total_embedding_length
        return {
            "total_tokens": tokens,
            "initial": min(1, receiver.transfers),
            "resumed": max(0, receiver.transfers - 1),
            "bytes": tokens * receiver.manager.geometry.layout.token_bytes,
            "transport": receiver.machine.transport,
        }

    def timing(self) -> dict[str, float]:
        """Seconds from the request to: the first tokens of its embedding, all of them, the first token of the answer,
        its end."""
        names = {"first_arrival": "arrived", "transferred": "transferred", "ttft": "first_token", "total": "ended"}
        spans = {name: self.since("submitted", mark) for name, mark in names.items()}
        return {name: span for name, span in spans.items() if span is not None}


def token_event(output: Output) -> dict[str, Any]:
    return {"type": "token", "text": output.text, "token_id": output.token}


def end_event(job: Job, output: Output) -> dict[str, Any]:
    prompt, completion = output.usage.prompt_tokens, output.usage.completion_tokens
    return {
        "type": "end",
        "finish_reason": output.finish_reason,
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        "transfer": job.transfer(),
        "timing": job.timing(),
    }
