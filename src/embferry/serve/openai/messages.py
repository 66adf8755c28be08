"""Parses the messages of a request into those for the language worker, and the pictures and videos in them.

They are read as OpenAI's API and vLLM read them. What the model's chat template makes of a role, of tool calls and of
names is up to the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from embferry.protocol.text import shown
from embferry.serve.config import LEAST_FPS, MOST_FPS
from embferry.serve.errors import ServeError
from embferry.serve.openai.ignored import EMPTY, Ignored
from embferry.serve.openai.tool_calls import ToolCalls
from embferry.serve.text_limit import count_characters

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Role in a request → role for the chat template."""
_AROUND = ("name", "tool_call_id", "tool_calls", "reasoning")
"""Texts that a parsed message may have beside its parts."""
_WITH_MEDIA = ("user", "tool")
_MAY_BE_EMPTY = ("assistant", "tool")
TEXT_TYPES = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Type of a part that is text → its field with the text."""
_MEDIA_TYPES = {
    "image_url": "image_url",
    "image": "image",
    "input_image": "image_url",
    "video_url": "video_url",
    "video": "video",
}
"""Type of a picture or video → its field with the URL."""
_TYPES = (*TEXT_TYPES, *_MEDIA_TYPES)
_UNTYPED = ("text", "image_url", "image", "video_url", "video")
"""The fields by which the type of a part without one is known."""
_CONTENTS = tuple(dict.fromkeys((*TEXT_TYPES.values(), *_MEDIA_TYPES.values())))
"""Fields that may hold the content of a part. A part has one of them: any other would be lost."""
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "tool_calls", "function_call", "audio", "tools"})
_FIELDS_OF_ROLE = {"tool": {"tool_call_id"}, "assistant": {"reasoning", "reasoning_content"}}


@dataclass(frozen=True, slots=True)
class Media:
    """A picture, a video file, or a video as a list of pictures.

    Attributes:
        kind: which of them; also the value of ``type`` for the workers.
        urls: one, or those of the listed pictures.
        param: the place in the request, for errors.
        listed: the video is a list of pictures, ``fps`` of them per second.
        fps: frames per second; None if not given.
    """

    kind: Literal["image", "video"]
    urls: tuple[str, ...]
    param: str
    listed: bool = False
    fps: float | None = None


class Place(NamedTuple):
    """Where a message stands in the request, for errors.

    Attributes:
        at: such as ``messages[2]``.
        content: the name of the field with its content.
    """

    at: str
    content: str = "content"


def parse_messages(
    messages: list[Any], ignored: Ignored | None = None, places: Sequence[Place] | None = None
) -> tuple[list[dict[str, Any]], list[Media]]:
    """Parses the messages.

    Args:
        messages: those of the request.
        ignored: gets the fields that have no effect.
        places: of the messages; None: in the field ``messages``.

    Returns:
        The messages for the language worker, ``{"role", "parts"}`` and some with ``tool_calls``, ``tool_call_id``,
        ``name`` or ``reasoning``; and the media, which the parts name by index.

    Raises:
        ServeError: invalid_request or unsupported_value, with a ``param`` such as ``messages[2].content[0]``.
    """
    reader = _Reader(Ignored() if ignored is None else ignored)
    places = places or [Place(f"messages[{number}]") for number in range(len(messages))]
    return [reader.message(message, *place) for message, place in zip(messages, places, strict=True)], reader.media


def characters_of(messages: list[dict[str, Any]]) -> int:
    """Returns the number of characters of all texts of parsed messages."""
    texts = sum(len(part.get("text", "")) for message in messages for part in message["parts"])
    return texts + sum(count_characters(message.get(name)) for message in messages for name in _AROUND)


class _Reader:
    """Reads the messages of one request."""

    def __init__(self, ignored: Ignored) -> None:
        self.media: list[Media] = []
        self._ignored = ignored
        self._calls = ToolCalls(ignored)

    def message(self, message: Any, at: str, content: str) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise _wrong(at, "must be an object with role and content")
        given = message.get("role")
        if not isinstance(given, str) or given not in ROLES:
            raise _unsupported(f"{at}.role", f"is {shown(given, 80)}; it must be one of {', '.join(ROLES)}")
        role = ROLES[given]
        for name, what in (("audio", "sound"), ("tools", "tools of a message")):
            if message.get(name) not in EMPTY:
                raise ServeError("unsupported_value", f"{at}.{name}: {what} cannot be read", param=f"{at}.{name}")
        self._ignored.note(message, _MESSAGE_FIELDS | _FIELDS_OF_ROLE.get(role, set()), at)
        parts = self._parts(message.get("content"), role, f"{at}.{content}")
        if role not in _WITH_MEDIA and any(part["type"] != "text" for part in parts):
            why = f"{at}: only messages of user and tool may have pictures or videos"
            raise ServeError("unsupported_value", why, param=f"{at}.{content}")
        return {"role": role, "parts": parts} | self._around(message, role, at)

    def _around(self, message: dict[str, Any], role: str, at: str) -> dict[str, Any]:
        """Returns what a message has beside its content."""
        texts = {"name": _text(message.get("name"), f"{at}.name")}
        if role == "tool":
            texts["tool_call_id"] = _text(message.get("tool_call_id"), f"{at}.tool_call_id")
        around: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
        if role == "assistant":
            name = "reasoning" if message.get("reasoning") is not None else "reasoning_content"
            reasoning = _text(message.get(name), f"{at}.{name}")
            if message.get("reasoning_content") not in (None, "", reasoning):
                self._ignored.add(f"{at}.reasoning_content")
            around |= {"reasoning": reasoning} if reasoning is not None else {}
            around |= self._calls.of(message, at)
        else:
            for name in ("tool_calls", "function_call"):
                if message.get(name) not in EMPTY:
                    raise _wrong(f"{at}.{name}", "belongs to messages of the assistant")
        return around

    def _parts(self, content: Any, role: str, at: str) -> list[dict[str, Any]]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if content is None and role in _MAY_BE_EMPTY:
            return []
        if not isinstance(content, list) or not (content or role in _MAY_BE_EMPTY):
            raise _wrong(at, "must be a string or a list of parts")
        return [self._part(part, f"{at}[{number}]") for number, part in enumerate(content)]

    def _part(self, part: Any, at: str) -> dict[str, Any]:
        """Parses text, OpenAI's ``{"type": "image_url", "image_url": {"url": …}}``, Qwen's ``{"type": "image", …}``."""
        if isinstance(part, str):
            return {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind is None:
            kind = _type_of(part, at)
        if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _TYPES:
            raise _unsupported(f"{at}.type", f"is {shown(kind, 80)}; it must be one of {', '.join(_TYPES)}")
        name = TEXT_TYPES.get(kind) or _MEDIA_TYPES[kind]
        self._check_alone(part, kind, name, at)
        if kind in TEXT_TYPES:
            self._ignored.note(part, frozenset({"type", name}), at)
            if not isinstance(text := part.get(name), str):
                raise _wrong(f"{at}.{name}", "must be a string")
            return {"type": "text", "text": text}
        if part.get("file_id") is not None:
            raise _unsupported(f"{at}.file_id", "names a stored file; send the picture itself, as a URL")
        self.media.append(self._medium(part, kind, name, at))
        return {"type": self.media[-1].kind, "item": len(self.media) - 1}

    def _medium(self, part: dict[str, Any], kind: str, name: str, at: str) -> Media:
        source, is_image = part.get(name), kind.endswith(("image", "image_url"))
        read = frozenset() if is_image else frozenset({"fps"})
        self._ignored.note(part, read | {"type", name}, at)
        if isinstance(source, dict):
            self._ignored.note(source, read | {"url"}, f"{at}.{name}")
        return Media("image", (_url(source, f"{at}.{name}"),), at) if is_image else _video(part, name, at)

    def _check_alone(self, part: dict[str, Any], kind: str, name: str, at: str) -> None:
        """Checks that nothing but one field of a part has content: the answer would be one to another question."""
        for other in _CONTENTS:
            if other != name and part.get(other) not in EMPTY:
                raise _wrong(f"{at}.{other}", f"does not belong to a part of type {kind}; send it as a part of its own")


def _type_of(part: dict[str, Any], at: str) -> str:
    """Returns the type of a part that names none, by its one field with content."""
    found = [name for name in _UNTYPED if part.get(name) is not None]
    if len(found) != 1:
        raise _unsupported(f"{at}.type", f"is missing; it must be one of {', '.join(_TYPES)}")
    return found[0]


def _video(part: dict[str, Any], name: str, at: str) -> Media:
    """Parses ``{"type": "video_url", "video_url": {"url": …}}`` or ``{"type": "video", "video": URL(s), "fps": 2}``."""
    where, source, fps = f"{at}.{name}", part.get(name), part.get("fps")
    if isinstance(source, dict):
        fps = source.get("fps", fps)
        source = source.get("url")
    if fps is not None:
        fps = _frame_rate(fps, f"{at}.fps")
    if isinstance(source, list):
        frames = tuple(_url(frame, f"{where}[{number}]") for number, frame in enumerate(source))
        return Media("video", frames, at, True, fps)
    return Media("video", (_url(source, where),), at, False, fps)


def _frame_rate(fps: Any, at: str) -> float:
    """Returns a frame rate as a float. An integer may have hundreds of digits, which no float has."""
    is_number = isinstance(fps, int | float) and not isinstance(fps, bool)
    if not (is_number and LEAST_FPS <= fps <= MOST_FPS):
        raise _wrong(at, f"must be a number of frames per second, from {LEAST_FPS} to {MOST_FPS}")
    return float(fps)


def _url(value: Any, at: str) -> str:
    if isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str) or not value:
        raise _wrong(at, "must hold a URL")
    return value


def _text(value: Any, at: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _wrong(at, "must be a string")
    return value


def _unsupported(at: str, rule: str) -> ServeError:
    return ServeError("unsupported_value", f"{at} {rule}", param=at)


def _wrong(at: str, rule: str) -> ServeError:
    return ServeError("invalid_request", f"{at} {rule}", param=at)
