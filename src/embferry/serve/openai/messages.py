"""Parses the messages of a request into those for the language worker, and the pictures and videos in them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from embferry.protocol.text import shown
from embferry.serve.errors import ServeError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TYPES = ("text", "image_url", "image", "video_url", "video")


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


def parse_messages(messages: list[Any]) -> tuple[list[dict[str, Any]], list[Media]]:
    """Parses the messages.

    Returns:
        The messages for the language worker, ``{"role", "parts"}``, and the media, which the parts name by index.

    Raises:
        ServeError: invalid_request or unsupported_value, with a ``param`` such as ``messages[2].content[0]``.
    """
    media: list[Media] = []
    return [_message(message, f"messages[{number}]", media) for number, message in enumerate(messages)], media


def _message(message: Any, at: str, media: list[Media]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(at, "must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _unsupported(f"{at}.role", f"is {shown(role, 80)}; it must be one of {', '.join(_ROLES)}")
    if message.get("tool_calls") or message.get("function_call"):
        raise ServeError("unsupported_value", f"{at} calls a tool; tools are not supported", param=f"{at}.tool_calls")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": _ROLES[role], "parts": [{"type": "text", "text": content}]}
    if not isinstance(content, list) or not content:
        raise _wrong(f"{at}.content", "must be a string or a list of parts")
    parts = [_part(part, f"{at}.content[{number}]", media) for number, part in enumerate(content)]
    if role != "user" and any(part["type"] != "text" for part in parts):
        why = f"{at}: only user messages may have pictures or videos"
        raise ServeError("unsupported_value", why, param=f"{at}.content")
    return {"role": _ROLES[role], "parts": parts}


def _part(part: Any, at: str, media: list[Media]) -> dict[str, Any]:
    """Parses text, OpenAI's ``{"type": "image_url", "image_url": {"url": …}}``, or Qwen's ``{"type": "image", …}``."""
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(name, str) or name not in _TYPES:
        raise _unsupported(f"{at}.type", f"is {shown(name, 80)}; it must be one of {', '.join(_TYPES)}")
    if name == "text":
        if not isinstance(text := part.get("text"), str):
            raise _wrong(f"{at}.text", "must be a string")
        return {"type": "text", "text": text}
    is_image = name.startswith("image")
    media.append(Media("image", (_url(part.get(name), f"{at}.{name}"),), at) if is_image else _video(part, name, at))
    return {"type": media[-1].kind, "item": len(media) - 1}


def _video(part: dict[str, Any], name: str, at: str) -> Media:
    """Parses ``{"type": "video_url", "video_url": {"url": …}}`` or ``{"type": "video", "video": URL(s), "fps": 2}``."""
    where, source, fps = f"{at}.{name}", part.get(name), part.get("fps")
    if isinstance(source, dict):
        fps = source.get("fps", fps)
        source = source.get("url")
    if fps is not None and not (isinstance(fps, int | float) and math.isfinite(fps) and 0 < fps <= 240):
        raise _wrong(f"{at}.fps", "must be a number of frames per second, above 0 and at most 240")
    if isinstance(source, list):
        frames = tuple(_url(frame, f"{where}[{number}]") for number, frame in enumerate(source))
        return Media("video", frames, at, True, fps)
    return Media("video", (_url(source, where),), at, False, fps)


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
