"""The pictures, videos and sounds of a request, and the same request with other parts in their place.

Every field by which a client could name an embedding or an address to vLLM is refused here: the language instance would
connect to that address, or take another client's picture for this one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.vllm.constraint_bounds import check_constraints

Kind = Literal["image", "video", "audio"]
WORDS: dict[Kind, str] = {"image": "picture", "video": "video", "audio": "sound"}

_SOURCES: dict[str, Kind] = {
    "image_url": "image", "video_url": "video", "image": "image", "video": "video", "audio_url": "audio",
    "input_audio": "audio",
}  # fmt: skip
"""The fields that may hold a picture, a video or a sound: its URL, or the data of an ``input_audio``."""
_BY_TYPE = {"input_image": "image_url", **{name: name for name in _SOURCES}}
"""Type of a part → its field with the URL."""
_FILES = tuple(_SOURCES)
_TEXTS = ("text", "input_text", "output_text", "refusal", "thinking", "tool_reference")
MAX_MODEL_NAME, MAX_UUID = 1000, 256
_RESERVED = ("ec_transfer_params", "kv_transfer_params")
"""Fields that name addresses to which an instance connects."""
_EMBEDDED = ("image_embeds", "video_embeds", "audio_embeds", "image_pil", "prompt_embeds")
_REPLACED = frozenset({"type", "uuid", "detail", *_FILES})
"""Fields of a part that the router writes itself; it keeps the others, which are for the chat template."""


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A picture, video or sound: ``request[field][message]["content"][part]``.

    Attributes:
        url: empty if the client gives a name alone; for the data of an ``input_audio``, a ``data:`` URL.
        extra: other fields of the part.
        uuid: the client's name for the file.
    """

    message: int
    part: int
    kind: Kind
    url: str
    extra: dict[str, Any]
    field: str = "messages"
    uuid: str | None = None

    @property
    def param(self) -> str:
        """The part's place, for errors."""
        return f"{self.field}[{self.message}].content[{self.part}]"


def parse_request(body: bytes) -> dict[str, Any]:
    """Returns a client's request.

    Raises:
        ServeError: invalid_json; model_not_found; unsupported_value for fields that only a router may set;
            invalid_request for a form of the answer that takes too much to compile.
    """
    request = parse_object(body)
    model = request.get("model")
    if isinstance(model, str) and len(model) > MAX_MODEL_NAME:  # instances would repeat it in answers and logs
        raise ServeError("model_not_found", f"the model {shown(model, 80)} is not served here", param="model")
    arguments = request.get("vllm_xargs")
    for name in _RESERVED:
        if request.get(name) is not None:
            raise _reserved(name)
        if isinstance(arguments, dict) and name in arguments:
            raise _reserved(f"vllm_xargs.{name}")
    if request.get("prompt_embeds") is not None:
        why = "prompt_embeds cannot come from a client; send the text itself"
        raise ServeError("unsupported_value", why, param="prompt_embeds")
    check_constraints(request)
    return request


def check_messages(request: dict[str, Any]) -> None:
    """Raises ServeError invalid_request if the messages are no list: vLLM's error would be one of Python."""
    if not isinstance(request.get("messages", []), list):
        raise ServeError("invalid_request", "messages must be a list", param="messages")


def media_parts(request: dict[str, Any]) -> list[MediaPart]:
    """Returns all pictures, videos and sounds in the order of the prompt.

    Malformed messages are left for vLLM to refuse.

    Raises:
        ServeError: invalid_request, unsupported_value, with the part in ``param``.
    """
    found = []
    for message, position, part in _parts(request):
        if media := _media_part(message, position, part):
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
    """Returns a copy without the ``uuid`` of any part: vLLM would look it up in a cache that all clients share.

    Texts without a ``type``, which vLLM does not take, have one in the copy.
    """
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
    for embedded in _EMBEDDED:
        if embedded in part or part.get("type") == embedded:
            why = f"{at}: {embedded} cannot come from a client; send the file itself (image_url, video_url, audio_url)"
            raise ServeError("unsupported_value", why, param=at)
    name = _source_of(part, at)
    if name is None:
        return None
    uuid = _uuid_in(part, at)
    source = part.get(name)
    url = _url_in(name, source)
    if url is None and uuid is not None:
        url = ""
    elif source is None:
        raise ServeError("invalid_request", f"{at}.{name} is missing", param=at)
    elif not url and name == "input_audio":
        raise ServeError("invalid_request", f"{at} must have a sound in base64, in input_audio.data", param=at)
    elif not isinstance(url, str) or not url:
        frames = "; a list of frames is data:video/jpeg;base64,FRAME,FRAME" if isinstance(source, list) else ""
        raise ServeError("invalid_request", f"{at} must have one URL, in {name}{frames}", param=at)
    extra = {key: value for key, value in part.items() if key not in _REPLACED}
    return MediaPart(message, position, _SOURCES[name], url, extra, uuid=uuid)


def _url_in(name: str, source: Any) -> Any:
    """Returns the URL in a field of a part, as the client has written it; None if there is none.

    An ``input_audio`` has data instead, and without data that are a text, an empty URL. Its ``format`` decides nothing:
    vLLM goes by the bytes.
    """
    if name != "input_audio":
        return source.get("url") if isinstance(source, dict) else source
    data = source.get("data") if isinstance(source, dict) else source
    if data is None:
        return None
    return f"data:audio/wav;base64,{data}" if data and isinstance(data, str) and isinstance(source, dict) else ""


def _uuid_in(part: dict[str, Any], at: str) -> str | None:
    """Returns the name that a client gives a file. Raises ServeError invalid_request if it cannot be one."""
    uuid = part.get("uuid")
    if uuid is not None and not (isinstance(uuid, str) and 0 < len(uuid) <= MAX_UUID):
        raise ServeError("invalid_request", f"{at}.uuid must be a text of 1 to {MAX_UUID} characters", param=at)
    return uuid


def _source_of(part: dict[str, Any], at: str) -> str | None:
    """Returns the field with the file of a part; None for another part, or one that vLLM refuses.

    A part of an unknown type that has an ``audio_url`` is a sound: no instance may get the address.

    Raises:
        ServeError: invalid_request for a part with two files, or a file beside a text. vLLM would choose one by its own
            order, and another one where the part has a uuid.
    """
    kind = part.get("type")
    given = [name for name in _FILES if part.get(name) is not None]
    if kind is None:
        own = given[0] if given else next((name for name in _SOURCES if name in part), None)
    elif not isinstance(kind, str) or kind not in (*_BY_TYPE, *_TEXTS):
        return "audio_url" if part.get("audio_url") is not None else None
    else:
        own = _BY_TYPE.get(kind, kind)
    if others := [name for name in given if name != own]:
        what = f"a part of type {kind}" if kind is not None else f"a part with {own}"
        raise ServeError("invalid_request", f"{at}: {what} cannot have {' and '.join(others)} too", param=at)
    return own if own in _SOURCES else None


def _parts(request: dict[str, Any]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields the number of the message, that of the part, and the part, for all that are objects."""
    messages = request.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for position, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict):
                yield number, position, part


def _without_uuid(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    rest = {key: value for key, value in part.items() if key != "uuid"}
    is_text = rest.get("type") is None and isinstance(rest.get("text"), str) and not any(n in rest for n in _FILES)
    return {**rest, "type": "text"} if is_text else rest


def _wants_audio(request: dict[str, Any]) -> bool:
    wanted = request.get("mm_processor_kwargs")
    return isinstance(wanted, dict) and bool(wanted.get("use_audio_in_video"))


def _reserved(name: str) -> ServeError:
    why = f"{name} cannot come from a client: it names an address that the server connects to; leave it out"
    return ServeError("unsupported_value", why, param=name)
