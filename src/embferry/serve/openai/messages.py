"""Parses the messages of a request into turns of text, pictures and videos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from embferry.serve.errors import ServeError

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture. ``param`` is its place in the request, for errors."""

    url: str
    param: str


@dataclass(frozen=True, slots=True)
class VideoPart:
    """A video: one file (``listed`` is false) or a list of pictures, ``fps`` of them per second (None: not given)."""

    urls: tuple[str, ...]
    listed: bool
    fps: float | None
    param: str


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    parts: tuple[Part, ...]


def turns(messages: list[Any]) -> list[Turn]:
    """Parses the messages.

    Raises:
        ServeError: invalid_request or unsupported_value, with a ``param`` such as ``messages[2].content[0]``.
    """
    return [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _turn(message: Any, at: str) -> Turn:
    if not isinstance(message, dict):
        raise _wrong(at, "must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _unsupported(f"{at}.role", f"is {role!r}; it must be one of {', '.join(_ROLES)}")
    if message.get("tool_calls") or message.get("function_call"):
        raise ServeError("unsupported_value", f"{at} calls a tool; tools are not supported", param=f"{at}.tool_calls")
    content = message.get("content")
    if isinstance(content, str):
        return Turn(_ROLES[role], (TextPart(content),))
    if not isinstance(content, list) or not content:
        raise _wrong(f"{at}.content", "must be a string or a list of parts")
    parts = tuple(_part(part, f"{at}.content[{number}]") for number, part in enumerate(content))
    if role != "user" and not all(isinstance(part, TextPart) for part in parts):
        why = f"{at}: only user messages may have pictures or videos"
        raise ServeError("unsupported_value", why, param=f"{at}.content")
    return Turn(_ROLES[role], parts)


def _part(part: Any, at: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    read = _PARTS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise _unsupported(f"{at}.type", f"is {kind!r}; it must be one of {', '.join(_PARTS)}")
    return read(part, at)


def _text(part: dict[str, Any], at: str) -> Part:
    if not isinstance(text := part.get("text"), str):
        raise _wrong(f"{at}.text", "must be a string")
    return TextPart(text)


def _image(part: dict[str, Any], at: str) -> Part:
    """Parses OpenAI's ``{"type": "image_url", "image_url": {"url": …}}``, Qwen's ``{"type": "image", "image": …}``."""
    name = str(part["type"])
    return ImagePart(_url(part.get(name), f"{at}.{name}"), at)


def _video(part: dict[str, Any], at: str) -> Part:
    """Parses ``{"type": "video_url", "video_url": {"url": …}}`` or ``{"type": "video", "video": URL(s), "fps": 2}``."""
    name = str(part["type"])
    where, source = f"{at}.{name}", part.get(name)
    fps = part.get("fps")
    if isinstance(source, dict):
        fps = source.get("fps", fps)
        source = source.get("url")
    if fps is not None and not (isinstance(fps, int | float) and math.isfinite(fps) and 0 < fps <= 240):
        raise _wrong(f"{at}.fps", "must be a number of frames per second, above 0 and at most 240")
    if isinstance(source, list):
        frames = tuple(_url(frame, f"{where}[{number}]") for number, frame in enumerate(source))
        return VideoPart(frames, True, fps, at)
    return VideoPart((_url(source, where),), False, fps, at)


_PARTS: dict[str, Callable[[dict[str, Any], str], Part]] = {
    "text": _text,
    "image_url": _image,
    "image": _image,
    "video_url": _video,
    "video": _video,
}


def _url(value: Any, at: str) -> str:
    if isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str) or not value:
        raise _wrong(at, "must hold a URL")
    return value


def _unsupported(at: str, rule: str) -> ServeError:
    return ServeError("unsupported_value", f"{at} {rule}", param=at)


def _wrong(at: str, rule: str) -> ServeError:
    return ServeError("invalid_request", f"{at} {rule}", param=at)
