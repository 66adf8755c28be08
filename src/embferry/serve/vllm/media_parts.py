"""The pictures and videos of a request, and the same request with other parts in their place.

Every field by which a client could name an embedding or an address to vLLM is refused here: the language instance would
connect to that address, or take another client's picture for this one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object

Kind = Literal["image", "video"]

_SOURCES: dict[str, Kind] = {"image_url": "image", "video_url": "video"}
"""The fields that may hold the URL. vLLM goes by them too where ``type`` is absent or ``input_image``."""
MAX_MODEL_NAME = 1000
_EMBEDDED = ("image_embeds", "video_embeds", "audio_embeds", "image_pil")
_REPLACED = frozenset({"type", "uuid", "detail", *_SOURCES})
"""Fields of a part that the router writes itself; it keeps the others, which are for the chat template."""


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A picture or video: ``request["messages"][message]["content"][part]``. ``extra``: other fields of the part."""

    message: int
    part: int
    kind: Kind
    url: str
    extra: dict[str, Any]

    @property
    def param(self) -> str:
        """The part's place, for errors."""
        return f"messages[{self.message}].content[{self.part}]"


def parse_request(body: bytes) -> dict[str, Any]:
    """Returns a client's request.

    Raises:
        ServeError: invalid_json; model_not_found; unsupported_value for fields that only a router may set.
    """
    request = parse_object(body)
    model = request.get("model")
    if isinstance(model, str) and len(model) > MAX_MODEL_NAME:  # instances would repeat it in answers and logs
        raise ServeError("model_not_found", f"the model {shown(model, 80)} is not served here", param="model")
    if request.get("ec_transfer_params") is not None:
        raise _reserved("ec_transfer_params")
    arguments = request.get("vllm_xargs")
    if isinstance(arguments, dict) and "ec_transfer_params" in arguments:
        raise _reserved("vllm_xargs.ec_transfer_params")
    return request


def media_parts(request: dict[str, Any]) -> list[MediaPart]:
    """Returns all pictures and videos in the order of the prompt. Malformed messages are left for vLLM to refuse.

    Raises:
        ServeError: invalid_request, unsupported_value, with the part in ``param``.
    """
    found = []
    messages = request.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for position, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and (media := _media_part(number, position, part)):
                found.append(media)
    if any(part.kind == "video" for part in found) and _wants_audio(request):
        why = "the audio of a video is not split from it; leave use_audio_in_video out"
        raise ServeError("unsupported_value", why, param="mm_processor_kwargs")
    return found


def with_parts(request: dict[str, Any], parts: Sequence[tuple[MediaPart, dict[str, Any]]]) -> dict[str, Any]:
    """Returns a copy of the request with another part in place of each of these media parts, and without uuids."""
    copy = without_uuids(request)
    for media, part in parts:
        copy["messages"][media.message]["content"][media.part] = {**media.extra, **part}
    return copy


def without_uuids(request: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy without the ``uuid`` of any part: vLLM would look it up in a cache that all clients share."""
    if not isinstance(messages := request.get("messages"), list):
        return request
    stripped = [
        {**message, "content": [_without_uuid(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    return {**request, "messages": stripped}


def _media_part(message: int, position: int, part: dict[str, Any]) -> MediaPart | None:
    at = f"messages[{message}].content[{position}]"
    kind = part.get("type")
    for name in _EMBEDDED:
        if name in part or kind == name:
            why = f"{at}: {name} cannot come from a client; send the picture or video itself (image_url, video_url)"
            raise ServeError("unsupported_value", why, param=at)
    sources = [name for name in _SOURCES if name in part]
    if not sources:
        if kind in (*_SOURCES, "input_image"):
            raise ServeError("invalid_request", f"{at}.{kind} is missing", param=at)
        return None
    name = sources[0]
    source = part[name]
    url = source.get("url") if isinstance(source, dict) else source
    if len(sources) > 1 or not isinstance(url, str) or not url:
        raise ServeError("invalid_request", f"{at} must have one URL, in {' or '.join(_SOURCES)}", param=at)
    extra = {key: value for key, value in part.items() if key not in _REPLACED}
    return MediaPart(message, position, _SOURCES[name], url, extra)


def _without_uuid(part: Any) -> Any:
    return {key: value for key, value in part.items() if key != "uuid"} if isinstance(part, dict) else part


def _wants_audio(request: dict[str, Any]) -> bool:
    wanted = request.get("mm_processor_kwargs")
    return isinstance(wanted, dict) and bool(wanted.get("use_audio_in_video"))


def _reserved(name: str) -> ServeError:
    why = f"{name} cannot come from a client: it names an address that the server connects to; leave it out"
    return ServeError("unsupported_value", why, param=name)
