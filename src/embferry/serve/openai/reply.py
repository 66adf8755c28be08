"""Completions, chunks and server-sent events in OpenAI's format."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from embferry.serve.errors import ServeError

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """One of the answers to a request, as far as it has arrived. ``logprobs``: an entry a token, if asked for."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(slots=True)
class Answer:
    """The part of an answer that has arrived.

    Attributes:
        end: the last event, once it is there.
        keeps_logprobs: log probabilities are kept for the whole reply. A stream sends them at once.
    """

    keeps_logprobs: bool = True
    choices: list[Choice] = field(default_factory=lambda: [Choice()])
    end: dict[str, Any] = field(default_factory=dict)

    def add(self, told: dict[str, Any]) -> None:
        """Adds a language worker's event ``token``."""
        number = told.get("choice", 0)
        while len(self.choices) <= number:
            self.choices.append(Choice())
        choice = self.choices[number]
        choice.tokens.append(told["token_id"])
        choice.text.append(told["text"])
        if "logprob" in told and self.keeps_logprobs:
            choice.logprobs.append(logprob_entry(told))

    def finish(self, end: dict[str, Any]) -> None:
        """Adds a language worker's event ``end``."""
        self.end = end
        reasons = end.get("finish_reasons") or [end["finish_reason"]]
        for choice, reason in zip(self.choices, reasons, strict=False):
            choice.finish_reason = reason

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(choice.tokens) for choice in self.choices)

    def extension(self, room: int | None) -> dict[str, Any]:
        """Returns the field ``embferry`` of the reply. The room is a text: JavaScript rounds numbers above 2⁵³."""
        tokens = [choice.tokens for choice in self.choices]
        return {
            "room": None if room is None else str(room),
            "transfer": self.end.get("transfer"),
            "tokens": tokens[0] if len(tokens) == 1 else tokens,
            "timing": self.end.get("timing"),
        }


def logprob_entry(told: dict[str, Any]) -> dict[str, Any]:
    """Returns the log probabilities of a token as ``choices[].logprobs.content`` has them."""
    return _one_logprob(told["piece"], told["logprob"]) | {"top_logprobs": [_one_logprob(*one) for one in told["top"]]}


def _one_logprob(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode(errors="replace"))}


class Form(ABC):
    """The form of the replies at one path."""

    @abstractmethod
    def opening(self) -> Iterable[dict[str, Any]]:
        """Yields the first events of a stream."""

    @abstractmethod
    def token(self, told: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Yields the events of a language worker's event ``token``."""

    @abstractmethod
    def closing(self, answer: Answer, extension: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Yields the last events of a stream. ``extension`` is the field ``embferry``, which other clients ignore."""

    @abstractmethod
    def whole(self, answer: Answer, extension: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply to a request without ``stream``."""

    def encoded(self, one: dict[str, Any]) -> bytes:
        """Returns an event as bytes."""
        return event(one)

    @property
    def done(self) -> bytes:
        """The mark after the last event."""
        return DONE


@dataclass(frozen=True, slots=True)
class Reply:
    """The fields that all parts of one answer share. ``created``: seconds since 1970."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, choices: Iterable[Choice], usage: Any, extension: dict[str, Any]) -> dict[str, Any]:
        """Returns the whole answer."""
        told = [
            {
                "index": number,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": _content(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for number, choice in enumerate(choices)
        ]
        return {**self._head("chat.completion"), "choices": told, "usage": usage, "embferry": extension}

    def opening(self, number: int = 0) -> dict[str, Any]:
        """Returns the first chunk of a choice."""
        return self._chunk({"role": "assistant", "content": ""}, number=number)

    def delta(self, text: str, number: int = 0, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Returns the chunk of one piece of text."""
        return self._chunk({"content": text}, number=number, logprobs=logprobs)

    def closing(self, finish_reason: str, extension: dict[str, Any] | None = None, number: int = 0) -> dict[str, Any]:
        """Returns the last chunk of a choice. The last one of all has the extension."""
        return self._chunk({}, finish_reason, number) | ({} if extension is None else {"embferry": extension})

    def usage(self, usage: Any) -> dict[str, Any]:
        """Returns the last chunk of a stream whose request set ``stream_options.include_usage``."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        number: int = 0,
        logprobs: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": _content(logprobs), "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatForm(Form):
    """Replies of ``/v1/chat/completions``.

    Args:
        model: the model's name.
        choices: how many there are.
        has_usage: whether a stream ends with the numbers of tokens.
    """

    def __init__(self, model: str, choices: int = 1, has_usage: bool = False) -> None:
        self._reply, self._choices, self._has_usage = Reply(model), choices, has_usage

    def opening(self) -> Iterable[dict[str, Any]]:
        return map(self._reply.opening, range(self._choices))

    def token(self, told: dict[str, Any]) -> Iterable[dict[str, Any]]:
        logprobs = [logprob_entry(told)] if "logprob" in told else None
        if told["text"] or logprobs:  # the text is empty where a token ends within a character
            yield self._reply.delta(told["text"], told.get("choice", 0), logprobs)

    def closing(self, answer: Answer, extension: dict[str, Any]) -> Iterable[dict[str, Any]]:
        last = len(answer.choices) - 1
        for number, choice in enumerate(answer.choices):
            yield self._reply.closing(choice.finish_reason, extension if number == last else None, number)
        if self._has_usage:
            yield self._reply.usage(answer.end["usage"])

    def whole(self, answer: Answer, extension: dict[str, Any]) -> dict[str, Any]:
        return self._reply.completion(answer.choices, answer.end["usage"], extension)


def _content(logprobs: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    return {"content": logprobs, "refusal": None} if logprobs else None


def event(value: dict[str, Any]) -> bytes:
    """Returns one server-sent event (WHATWG HTML, 9.2). JSON has no raw line breaks, so one ``data`` line is enough."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ServeError) -> bytes:
    """Returns the last event of a stream that fails. Clients raise an error; no ``[DONE]`` follows."""
    return event(error.body())


def model_object(name: str, created: int) -> dict[str, Any]:
    """Returns the entry of a model in ``/v1/models``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "embferry"}
