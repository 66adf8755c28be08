"""The pictures and videos of a request: fetched, checked by their headers, and in the encode worker's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.decoding.media import check
from embferry.serve.media.fetch import Fetcher, Grow, is_frame_list
from embferry.serve.media.film import LISTED_FPS
from embferry.serve.media.limits import check_counts, fetch_all
from embferry.serve.media.video import check_frames
from embferry.serve.off_loop import off_loop
from embferry.serve.openai.messages import Media


async def load_media(
    media: Sequence[Media], fetcher: Fetcher, limits: MediaSettings, grow: Grow
) -> list[dict[str, Any]]:
    """Fetches and checks the media of a request, and returns the items for the encode worker, in the same order.

    ``grow`` is called as :meth:`Fetcher.fetch` does.

    Raises:
        ServeError: too many items, or an error of ``Fetcher.fetch``, ``check_image``, ``check_video`` or
            ``check_frames``, with the part of the request in ``param``. Of several errors, the first in the request.
    """
    check_counts([part.kind for part in media], limits)
    budget = _Budget(limits)
    items = await fetch_all(media, lambda part: _item(part, fetcher, limits, budget, grow))
    return [item | {"param": part.param} for item, part in zip(items, media, strict=True)]


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


async def _item(part: Media, fetcher: Fetcher, limits: MediaSettings, budget: _Budget, grow: Grow) -> dict[str, Any]:
    if part.listed or (part.kind == "video" and is_frame_list(part.urls[0])):
        if len(part.urls) > limits.max_video_frames:
            check_frames([b""] * len(part.urls), limits)  # raises before any frame is fetched
        if part.listed:
            frames = [budget.take(await fetcher.fetch(url, grow)) for url in part.urls]
        else:
            url = part.urls[0]
            grow(len(url) // 4 * 3)
            frames = [budget.take(frame) for frame in await off_loop(len(url), fetcher.inline_frames, url)]
        await check("check_frames", frames, limits)
        return {"kind": "video", "frames": frames, "fps": float(part.fps or LISTED_FPS)}
    data = budget.take(await fetcher.fetch(part.urls[0], grow))
    await check("check_image" if part.kind == "image" else "check_video", [data], limits)
    return {"kind": part.kind, "data": data} | ({"fps": part.fps} if part.fps else {})
