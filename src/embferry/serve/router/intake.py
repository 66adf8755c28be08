"""The pictures and videos of a request: fetched, checked by their headers, and put into the encode worker's words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher
from embferry.serve.media.image import check_image
from embferry.serve.media.video import check_frames, check_video
from embferry.serve.openai.messages import ImagePart, TextPart, Turn, VideoPart

DEFAULT_FRAME_RATE = 2.0
"""Frames a second of a list of frames that does not say; what Qwen's own tools assume."""
_AT_ONCE = 4
"""Files of a request fetched at the same time."""


@dataclass(frozen=True, slots=True)
class Intake:
    """Attributes:
    items: for the encode worker, in the order of the prompt.
    messages: for the language worker, ``{"role", "parts"}``; pictures and videos are indices into ``items``.
    """

    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]


async def take_in(turns: list[Turn], fetcher: Fetcher, limits: MediaSettings) -> Intake:
    """Raises:
    ServeError: too many items; anything ``Fetcher.fetch``, ``check_image``, ``check_video`` or ``check_frames``
        refuses, with the part of the request in ``param``; the first of the request, if several are wrong.
    """
    media = [part for turn in turns for part in turn.parts if not isinstance(part, TextPart)]
    _count(media, limits)
    slots = asyncio.Semaphore(_AT_ONCE)
    budget = _Budget(limits)
    outcomes = await asyncio.gather(*(_item(part, fetcher, limits, slots, budget) for part in media))
    for outcome in outcomes:
        if isinstance(outcome, ServeError):
            raise outcome
    index = {id(part): number for number, part in enumerate(media)}
    return Intake([o for o in outcomes if isinstance(o, dict)], [_message(turn, index) for turn in turns])


def _count(media: list[ImagePart | VideoPart], limits: MediaSettings) -> None:
    for kind, code, word, most, setting in (
        (ImagePart, "too_many_images", "pictures", limits.max_images, "media.max_images"),
        (VideoPart, "too_many_videos", "videos", limits.max_videos, "media.max_videos"),
    ):
        count = sum(isinstance(part, kind) for part in media)
        if count > most:
            raise ServeError(
                code, f"the request has {count} {word}; at most {most} are taken ({setting})", param="messages"
            )


def _message(turn: Turn, index: dict[int, int]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, TextPart):
            parts.append({"type": "text", "text": part.text})
        else:
            parts.append({"type": "image" if isinstance(part, ImagePart) else "video", "item": index[id(part)]})
    return {"role": turn.role, "parts": parts}


class _Budget:
    """The bytes all files of a request may have together."""

    def __init__(self, limits: MediaSettings) -> None:
        self._most = self._left = limits.max_total_bytes

    def take(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ServeError(
                "media_too_large",
                f"the files of the request have more than {self._most:,} bytes (media.max_total_bytes)",
            )
        return data


async def _item(
    part: ImagePart | VideoPart, fetcher: Fetcher, limits: MediaSettings, slots: asyncio.Semaphore, budget: _Budget
) -> dict[str, Any] | ServeError:
    """One item in the encode worker's words. An error is returned, so that the first of the request can be told."""
    try:
        async with slots:
            if isinstance(part, ImagePart):
                data = budget.take(await fetcher.fetch(part.url))
                await _checked(check_image, data, limits)
                return {"kind": "image", "data": data}
            if part.listed or _is_frame_list(part.urls[0]):
                return await _frames(part, fetcher, limits, budget)
            data = budget.take(await fetcher.fetch(part.urls[0]))
            await _checked(check_video, data, limits)
            return {"kind": "video", "data": data} | ({"fps": part.fps} if part.fps else {})
    except ServeError as error:
        return error.at(part.param)


async def _frames(part: VideoPart, fetcher: Fetcher, limits: MediaSettings, budget: _Budget) -> dict[str, Any]:
    if len(part.urls) > limits.max_video_frames:  # before any is fetched
        check_frames([b""] * len(part.urls), limits)
    if part.listed:
        frames = [budget.take(await fetcher.fetch(url)) for url in part.urls]
    else:
        frames = [budget.take(frame) for frame in fetcher.inline_frames(part.urls[0])]
    await _checked(check_frames, frames, limits)
    return {"kind": "video", "frames": frames, "fps": float(part.fps or DEFAULT_FRAME_RATE)}


def _is_frame_list(url: str) -> bool:
    return url[:16].lower().startswith(("data:video/jpeg;", "data:video/jpg;"))


async def _checked(check: Callable[[Any, MediaSettings], object], data: Any, limits: MediaSettings) -> None:
    """Off the event loop: even a header can take a while to read."""
    await asyncio.to_thread(check, data, limits)
