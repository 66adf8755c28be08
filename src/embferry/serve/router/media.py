"""The pictures and videos of a request: fetched, checked by their headers, and in the encode worker's format."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher
from embferry.serve.media.image import check_image
from embferry.serve.media.limits import check_counts, fetch_all
from embferry.serve.media.video import check_frames, check_video
from embferry.serve.openai.messages import ImagePart, TextPart, Turn, VideoPart

DEFAULT_FRAME_RATE = 2.0
"""Frames a second of a list of frames without ``fps``; the value that Qwen's own tools assume."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request in the workers' formats.

    Attributes:
        items: the media for the encode worker, in the order of the prompt.
        messages: for the language worker, ``{"role", "parts"}``; pictures and videos are indices into ``items``.
    """

    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]


async def load_media(turns: list[Turn], fetcher: Fetcher, limits: MediaSettings) -> Prompt:
    """Fetches and checks the media of a request.

    Raises:
        ServeError: too many items, or an error of ``Fetcher.fetch``, ``check_image``, ``check_video`` or
            ``check_frames``, with the part of the request in ``param``. Of several errors, the first in the request.
    """
    media = [part for turn in turns for part in turn.parts if not isinstance(part, TextPart)]
    check_counts(["image" if isinstance(part, ImagePart) else "video" for part in media], limits)
    budget = _Budget(limits)
    items = await fetch_all(media, lambda part: _item(part, fetcher, limits, budget))
    index = {id(part): number for number, part in enumerate(media)}
    return Prompt(items, [_message(turn, index) for turn in turns])


def _message(turn: Turn, index: dict[int, int]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, TextPart):
            parts.append({"type": "text", "text": part.text})
        else:
            parts.append({"type": "image" if isinstance(part, ImagePart) else "video", "item": index[id(part)]})
    return {"role": turn.role, "parts": parts}


class _Budget:
    """Counts the bytes of all files of a request against ``media.max_total_bytes``."""

    def __init__(self, limits: MediaSettings) -> None:
        self._most = self._left = limits.max_total_bytes

    def take(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            why = f"the files of the request have more than {self._most:,} bytes (media.max_total_bytes)"
            raise ServeError("media_too_large", why)
        return data


async def _item(
    part: ImagePart | VideoPart, fetcher: Fetcher, limits: MediaSettings, budget: _Budget
) -> dict[str, Any]:
    """Returns one item in the encode worker's format."""
    if isinstance(part, ImagePart):
        data = budget.take(await fetcher.fetch(part.url))
        await _checked(check_image, data, limits)
        return {"kind": "image", "data": data}
    if part.listed or _is_frame_list(part.urls[0]):
        return await _frames(part, fetcher, limits, budget)
    data = budget.take(await fetcher.fetch(part.urls[0]))
    await _checked(check_video, data, limits)
    return {"kind": "video", "data": data} | ({"fps": part.fps} if part.fps else {})


async def _frames(part: VideoPart, fetcher: Fetcher, limits: MediaSettings, budget: _Budget) -> dict[str, Any]:
    if len(part.urls) > limits.max_video_frames:
        check_frames([b""] * len(part.urls), limits)  # raises before any frame is fetched
    if part.listed:
        frames = [budget.take(await fetcher.fetch(url)) for url in part.urls]
    else:
        frames = [budget.take(frame) for frame in fetcher.inline_frames(part.urls[0])]
    await _checked(check_frames, frames, limits)
    return {"kind": "video", "frames": frames, "fps": float(part.fps or DEFAULT_FRAME_RATE)}


def _is_frame_list(url: str) -> bool:
    return url[:16].lower().startswith(("data:video/jpeg;", "data:video/jpg;"))


async def _checked(check: Callable[[Any, MediaSettings], object], data: Any, limits: MediaSettings) -> None:
    """Checks outside the event loop: even reading a header can be slow."""
    await asyncio.to_thread(check, data, limits)
