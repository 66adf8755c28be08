"""Completions, chunks and server-sent events in OpenAI's format."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from embferry.serve.errors import ServeError

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """The fields that all parts of one answer share. ``created``: seconds since 1970."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, finish_reason: str, usage: Any, extension: dict[str, Any]) -> dict[str, Any]:
        """Returns the whole answer. ``extension`` is the field ``embferry``, which other clients ignore."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage, "embferry": extension}

    def opening(self) -> dict[str, Any]:
        """Returns the first chunk of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: str) -> dict[str, Any]:
        """Returns the chunk of one piece of text."""
        return self._chunk({"content": text})

    def closing(self, finish_reason: str, extension: dict[str, Any]) -> dict[str, Any]:
        """Returns the last chunk with a choice."""
        return {**self._chunk({}, finish_reason), "embferry": extension}

    def usage(self, usage: Any) -> dict[str, Any]:
        """Returns the last chunk of a stream whose request set ``stream_options.include_usage``."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(value: dict[str, Any]) -> bytes:
    """Returns one server-sent event (WHATWG HTML, 9.2). JSON has no raw line breaks, so one ``data`` line is enough."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ServeError) -> bytes:
    """Returns the last event of a stream that fails. Clients raise an error; no ``[DONE]`` follows."""
    return event(error.body())


def model_object(name: str, created: int) -> dict[str, Any]:
    """Returns the entry of a model in ``/v1/models``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "embferry"}
