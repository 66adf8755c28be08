"""Decodes media files into items ready for the encoder. Needs no model, and runs on threads of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from embferry.engine.media import MediaItem, MediaProcessor, PreparedItem, Video
from embferry.serve.config import MediaSettings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.media.decoding import media as decoding
from embferry.serve.media.decoding.cancellation import Cancellation, CancelledWorkError
from embferry.serve.media.film import LISTED_FPS
from embferry.serve.shared_threads import SharedThreads

T = TypeVar("T")


async def in_turn(threads: SharedThreads, client: str, call: Callable[[], T], cancellation: Cancellation) -> T:
    """Returns the result of ``call``, which is work of ``client``. Ends with the task that waits for it.

    Raises:
        CancelledWorkError: ``cancellation`` was set before the work began, or the threads were closed.
    """
    work = threads.submit(client, call)
    waiting = asyncio.wrap_future(work)
    try:
        with cancellation.calling(work.cancel):
            await asyncio.wait({waiting})
    finally:
        waiting.cancel()
    if waiting.cancelled():
        raise CancelledWorkError
    return waiting.result()


def prepare(items: Sequence[EncodeItem], media: MediaProcessor, limits: MediaSettings) -> list[PreparedItem]:
    """Decodes every item and cuts it into patches. Raises as :func:`prepare_item`."""
    return [prepare_item(item, media, limits) for item in items]


def prepare_item(
    item: EncodeItem,
    media: MediaProcessor,
    limits: MediaSettings,
    cancellation: Cancellation | None = None,
    grow: Callable[[int], object] = lambda nbytes: None,
) -> PreparedItem:
    """Decodes an item and cuts it into patches. Blocks.

    Args:
        item: the media file.
        media: cuts it.
        limits: the settings.
        cancellation: ends the work from another thread.
        grow: called with the bytes that each decoded picture, and the work on it, take until this returns, before they
            are in memory.

    Raises:
        ServeError: a decoder of :mod:`embferry.serve.media` refuses the file.
        MediaError: the model does not support the size.
        CancelledWorkError: ``cancellation`` is set.
    """
    decoded = _decoded(item, limits, cancellation or Cancellation(), grow)
    grow(media.working_bytes(decoded))
    return media.prepare(decoded)


def _decoded(
    item: EncodeItem, limits: MediaSettings, cancellation: Cancellation, grow: Callable[[int], object]
) -> MediaItem:
    if item.kind == "image":
        return decoding.image(item.data or b"", limits, cancellation, grow)
    if item.frames is not None:
        video = decoding.frames(item.frames, item.fps or LISTED_FPS, limits, cancellation, grow)
    else:
        video = decoding.video(item.data or b"", limits, item.fps, cancellation, grow)
    return Video(video.frames, video.fps)
