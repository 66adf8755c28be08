"""A request taken apart: where its pictures and videos stand, and the same request with something else in their place.

Everything that vLLM would take from a client and that names an embedding or an address is refused here: the instance
that answers would connect to it, or take another client's picture for this one's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from embferry.serve.errors import ServeError

Kind = Literal["image", "video"]

_SOURCES: dict[str, Kind] = {"image_url": "image", "video_url": "video"}
"""By the field that has the URL: vLLM goes by it too where ``type`` is absent or ``input_image``."""
_EMBEDDED = ("image_embeds", "video_embeds", "audio_embeds", "image_pil")
_OURS = frozenset({"type", "uuid", "detail", *_SOURCES})
"""Fields of a part that are written anew; others are for the chat template."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture or video stands: ``request["messages"][message]["content"][part]``."""

    message: int
    part: int
    kind: Kind
    url: str
    extra: dict[str, Any]
    """Other fields of the part."""

    @property
    def param(self) -> str:
        return f"messages[{self.message}].content[{self.part}]"


def parsed(body: bytes) -> dict[str, Any]:
    """Raises ServeError invalid_json."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise ServeError("invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ServeError("invalid_json", "the body must be a JSON object")
    return value


def read(body: bytes) -> dict[str, Any]:
    """Raises:
    ServeError: invalid_json; unsupported_value for what only a router may say.
    """
    request = parsed(body)
    if request.get("ec_transfer_params") is not None:
        raise _reserved("ec_transfer_params")
    arguments = request.get("vllm_xargs")
    if isinstance(arguments, dict) and "ec_transfer_params" in arguments:
        raise _reserved("vllm_xargs.ec_transfer_params")
    return request


def places(request: dict[str, Any]) -> list[Place]:
    """Every picture and video, in the order of the prompt. What is no message at all is left for vLLM to refuse.

    Raises:
        ServeError: invalid_request, unsupported_value, with the part in ``param``.
    """
    found = []
    messages = request.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for position, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and (place := _place(number, position, part)):
                found.append(place)
    if any(place.kind == "video" for place in found) and _asks_for_sound(request):
        why = "the sound of a video is not split from it; use_audio_in_video is not offered"
        raise ServeError("unsupported_value", why, param="mm_processor_kwargs")
    return found


def filled(request: dict[str, Any], parts: Sequence[tuple[Place, dict[str, Any]]]) -> dict[str, Any]:
    """A copy of the request with each of these parts in its place."""
    messages = list(request["messages"])
    for place, part in parts:
        if messages[place.message] is request["messages"][place.message]:
            message = request["messages"][place.message]
            messages[place.message] = {**message, "content": [_unnamed(other) for other in message["content"]]}
        messages[place.message]["content"][place.part] = {**place.extra, **part}
    return {**request, "messages": messages}


def without_names(request: dict[str, Any]) -> bool:
    """Whether no part has a ``uuid``: then a request of text alone may pass as it came."""
    messages = request.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(isinstance(part, dict) and "uuid" in part for part in content):
            return False
    return True


def nameless(request: dict[str, Any]) -> dict[str, Any]:
    """A copy without the ``uuid`` of any part: vLLM would look it up, whoever has put it there."""
    messages = [
        {**message, "content": [_unnamed(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in request["messages"]
    ]
    return {**request, "messages": messages}


def _place(message: int, position: int, part: dict[str, Any]) -> Place | None:
    at = f"messages[{message}].content[{position}]"
    kind_said = part.get("type")
    for name in _EMBEDDED:
        if name in part or kind_said == name:
            why = f"{at}: {name} cannot come from a client; send the picture or video itself (image_url, video_url)"
            raise ServeError("unsupported_value", why, param=at)
    sources = [name for name in _SOURCES if name in part]
    if not sources:
        if kind_said in (*_SOURCES, "input_image"):
            raise ServeError("invalid_request", f"{at}.{kind_said} is missing", param=at)
        return None
    name = sources[0]
    source = part[name]
    url = source.get("url") if isinstance(source, dict) else source
    if len(sources) > 1 or not isinstance(url, str) or not url:
        raise ServeError("invalid_request", f"{at} must hold one URL, in {' or '.join(_SOURCES)}", param=at)
    extra = {key: value for key, value in part.items() if key not in _OURS}
    return Place(message, position, _SOURCES[name], url, extra)


def _unnamed(part: Any) -> Any:
    return {key: value for key, value in part.items() if key != "uuid"} if isinstance(part, dict) else part


def _asks_for_sound(request: dict[str, Any]) -> bool:
    wanted = request.get("mm_processor_kwargs")
    return isinstance(wanted, dict) and bool(wanted.get("use_audio_in_video"))


def _reserved(name: str) -> ServeError:
    why = f"{name} cannot come from a client: it names an address that the server connects to; leave it out"
    return ServeError("unsupported_value", why, param=name)
