"""``/v1/responses``: requests as conversations, and replies in the form of that path. Nothing is stored."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.openai.constraints import RESPONSE_FORMAT
from embferry.serve.openai.fields import Rule, refuse_unsupported
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.messages import Place
from embferry.serve.openai.reply import Answer, Form
from embferry.serve.openai.request import validated
from embferry.serve.openai.sampling import Count, SamplingFields

_LIMITED: dict[str, Rule] = {
    "n": (lambda v: v == 1, "one answer"),
    "previous_response_id": (lambda v: not v, "nothing is stored; send the conversation as input"),
    "conversation": (lambda v: not v, "nothing is stored; send the conversation as input"),
    "background": (lambda v: not v, "answers come at once"),
    "prompt": (lambda v: not v, "no stored prompts"),
    "include": (lambda v: not v, "the answer only"),
    "reasoning": (lambda v: not v or v in ({"effort": "none"}, {"effort": None}), "no reasoning"),
    "truncation": (lambda v: v == "disabled", "a prompt is never cut"),
    "top_logprobs": (lambda v: not v, "/v1/chat/completions has them"),
    "logprobs": (lambda v: not v, "/v1/chat/completions has them"),
    "max_tool_calls": (lambda v: not v, "no tools"),
}
"""Fields of this path that are refused unless their value asks for nothing; ``LIMITED`` of :mod:`.fields` too."""
_ITEM_FIELDS = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
"""Type of an item → the fields that are read. All have ``type``, ``id`` and ``status``, too."""
FORMAT = "text.format"
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class ResponsesRequest(SamplingFields):
    """The fields that work."""

    input: Any = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: dict[str, Any] | None = None
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_output_tokens


class Conversation(NamedTuple):
    """Messages as ``/v1/chat/completions`` has them, and where each stands in the request."""

    messages: list[Any]
    places: list[Place]


def parse_responses(body: dict[str, Any], ignored: Ignored) -> tuple[ResponsesRequest, Conversation, dict[str, Any]]:
    """Validates a request.

    Returns:
        The request; its conversation; the body with ``text.format`` in the place of ``response_format``.

    Raises:
        ServeError: invalid_request or unsupported_value with the field in ``param``.
    """
    refuse_unsupported(body, _LIMITED)
    request = validated(ResponsesRequest, {k: v for k, v in body.items() if k not in _LIMITED}, ignored)
    form = (request.text or {}).get("format")
    for name, value in (request.text or {}).items():
        if name != "format" and (name, value) != ("verbosity", "medium"):
            ignored.add(f"text.{name}")
    if body.get(RESPONSE_FORMAT) is not None:
        ignored.add(RESPONSE_FORMAT)
    conversation = _items(request.input, ignored)
    if request.instructions:
        conversation.messages.insert(0, {"role": "system", "content": request.instructions})
        conversation.places.insert(0, Place("instructions"))
    others = {name: value for name, value in body.items() if name != RESPONSE_FORMAT}
    return request, conversation, others | ({} if form is None else {RESPONSE_FORMAT: form})


def _items(given: Any, ignored: Ignored) -> Conversation:
    """Returns the input as messages."""
    if isinstance(given, str) and given:
        return Conversation([{"role": "user", "content": given}], [Place("input")])
    if not isinstance(given, list) or not given:
        raise _wrong("input", "must be a text or a list of items, not empty")
    places = [Place(f"input[{number}]", _content_of(item)) for number, item in enumerate(given)]
    return Conversation([_item(item, place.at, ignored) for item, place in zip(given, places, strict=True)], places)


def _content_of(item: Any) -> str:
    """Returns the name of the field with the content of an item."""
    return "output" if isinstance(item, dict) and item.get("type") == "function_call_output" else "content"


def _item(item: Any, at: str, ignored: Ignored) -> Any:
    if not isinstance(item, dict):
        raise _wrong(at, "must be an object")
    kind = item.get("type") or "message"
    if not isinstance(kind, str) or kind not in _ITEM_FIELDS:
        why = f"{at}.type is {shown(kind, 80)}; it must be one of {', '.join(_ITEM_FIELDS)}"
        raise ServeError("unsupported_value", why, param=f"{at}.type")
    ignored.note(item, ("type", "id", "status", *_ITEM_FIELDS[kind]), at)
    if kind == "message":
        return {name: item[name] for name in ("role", "content") if name in item}
    for name in ("call_id", "name"):
        if name in _ITEM_FIELDS[kind] and not isinstance(item.get(name), str):
            raise _wrong(f"{at}.{name}", "must be a string")
    if kind == "function_call":
        function = {"name": item["name"], "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": [{"id": item["call_id"], "function": function}]}
    return {"role": "tool", "tool_call_id": item["call_id"], "content": item.get("output")}


def _wrong(at: str, rule: str) -> ServeError:
    return ServeError("invalid_request", f"{at} {rule}", param=at)


class ResponsesForm(Form):
    """Replies of ``/v1/responses``: one message with one text.

    Args:
        model: the model's name.
        request: what the reply repeats.
    """

    def __init__(self, model: str, request: ResponsesRequest) -> None:
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._number = 0
        self._head = {
            "id": self._id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": False,
            "temperature": request.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "store": False,
        }

    def opening(self) -> Iterable[dict[str, Any]]:
        started = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        item = {**self._message([], "in_progress")}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=_text_part(""))

    def token(self, told: dict[str, Any]) -> Iterable[dict[str, Any]]:
        if told["text"]:
            yield self._event("response.output_text.delta", **self._place, delta=told["text"], logprobs=[])

    def closing(self, answer: Answer, extension: dict[str, Any]) -> Iterable[dict[str, Any]]:
        whole = self.whole(answer, extension)
        (item,) = whole["output"]
        (part,) = item["content"]
        yield self._event("response.output_text.done", **self._place, text=part["text"], logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def whole(self, answer: Answer, extension: dict[str, Any]) -> dict[str, Any]:
        choice, usage = answer.choices[0], answer.end["usage"]
        is_cut = choice.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._message([_text_part("".join(choice.text))], status)],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "embferry": extension,
        }

    def encoded(self, one: dict[str, Any]) -> bytes:
        data = json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode()
        return f"event: {one['type']}\n".encode() + b"data: " + data + b"\n\n"

    @property
    def done(self) -> bytes:
        return b""

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _message(self, content: list[Any], status: str) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
