"""The requests of SGLang's load balancer: OpenAI's, with a room and the encode side's bootstrap server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from embferry.disaggregation.wire.messages import MAX_PORT, MAX_ROOM
from embferry.protocol.text import shown
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.openai.constraints import constraint_of
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.messages import TEXT_TYPES, Media, characters_of, parse_messages
from embferry.serve.openai.request import ChatRequest, parse
from embferry.serve.text_limit import check_characters

MAX_RID = 512
_HOST = re.compile(r"[0-9A-Za-z._-]{1,255}|\[[0-9A-Fa-f:.%]{2,64}\]")


@dataclass(frozen=True, slots=True)
class OriginRequest:
    """A request.

    Attributes:
        request: Its sampling and form; without messages.
        messages: ``{"role", "parts"}``, as our router gives them to workers.
        media: Pictures and videos, which the parts name by index.
        room: The ``bootstrap_room``.
        bootstrap_addr: ``host:port`` of the encode side's bootstrap server; empty if only the room is given.
        rid: The load balancer's name of the request, for its abort.
        constraint: What the answer must match.
    """

    request: ChatRequest
    messages: list[dict[str, Any]]
    media: list[Media]
    room: int
    bootstrap_addr: str
    rid: str
    constraint: dict[str, Any] | None = None

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages as the engine's prompt builder takes them."""
        return [{"content": m["parts"], **{k: v for k, v in m.items() if k != "parts"}} for m in self.messages]


def parse_origin(body: bytes, settings: Settings, *, texts_only: bool) -> OriginRequest:
    """Parses a request.

    Args:
        body: JSON.
        settings: The limits, the name of the model, and the port of a bootstrap server that the request does not name.
        texts_only: Leave the media out, which the embedding has already.

    Raises:
        ServeError: The request is wrong; ``param`` names the field.
    """
    fields = parse_object(body)
    if not fields.get("stream"):
        fields.pop("stream_options", None)  # the load balancer leaves it in the encode side's copy
    request = parse(fields)
    room = _integer(fields, "bootstrap_room", MAX_ROOM)
    if room is None:
        why = "bootstrap_room is missing; a worker with --wire origin takes the requests of SGLang's load balancer"
        raise ServeError("invalid_request", why, param="bootstrap_room")
    messages, media = parse_messages(_texts(request.messages) if texts_only else request.messages)
    check_characters(characters_of(messages), settings.language)
    address = _address(fields, settings)
    rid = fields.get("rid")
    rid = rid[:MAX_RID] if isinstance(rid, str) else str(room)
    constraint = constraint_of(fields, Ignored())
    form = None if constraint is None else constraint.value
    return OriginRequest(request.model_copy(update={"messages": []}), messages, media, room, address, rid, form)


def _address(fields: dict[str, Any], settings: Settings) -> str:
    host = fields.get("bootstrap_host")
    if host is None:
        return ""
    if not isinstance(host, str) or not _HOST.fullmatch(host):
        why = f"bootstrap_host is {shown(host, 80)}; it must be a host name or address"
        raise ServeError("invalid_request", why, param="bootstrap_host")
    return f"{host}:{_integer(fields, 'bootstrap_port', MAX_PORT) or settings.bootstrap.port}"


def _integer(fields: dict[str, Any], name: str, highest: int) -> int | None:
    value = fields.get(name)
    if value is None or (type(value) is int and 0 <= value <= highest):
        return value
    why = f"{name} is {shown(value, 80)}; it must be one whole number, 0 to {highest}"
    raise ServeError("invalid_request", why, param=name)


def _texts(messages: list[Any]) -> list[Any]:
    """Returns the messages without parts that are no text. Wrong messages stay as they are."""
    kept = []
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            message = {**message, "content": [part for part in message["content"] if _may_be_text(part)] or ""}
        kept.append(message)
    return kept


def _may_be_text(part: Any) -> bool:
    return not isinstance(part, dict) or str(part.get("type")) in TEXT_TYPES or "text" in part
