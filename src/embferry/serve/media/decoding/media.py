"""The calls of router and encode worker: checks and decoding, each in a process beside this one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Literal

from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.media.decoding.cancellation import Cancellation
from embferry.serve.media.decoding.pool import POOL, PROCESSES
from embferry.serve.media.fetch import Grow
from embferry.serve.media.video import Frames
from embferry.serve.shared_threads import SharedThreads

_THREADS = SharedThreads(PROCESSES, "check", spares=True)


def _ignore(nbytes: int) -> None:
    """For callers that count no bytes."""


async def check(
    task: Literal["check_image", "check_video", "check_frames"], files: Sequence[bytes], limits: MediaSettings
) -> None:
    """Checks a file, or the frames of a video, by the headers. Ends with the task that waits for it.

    Raises:
        ServeError: those of ``check_image``, ``check_video`` or ``check_frames``; media_decoder_failed.
    """
    cancellation = Cancellation()
    try:
        await _THREADS.run(partial(POOL.run, task, files, limits, None, cancellation))
    except asyncio.CancelledError:
        cancellation.cancel()
        raise


def image(data: bytes, limits: MediaSettings, cancellation: Cancellation, grow: Grow = _ignore) -> Image.Image:
    """Decodes a picture; see :func:`~embferry.serve.media.image.decode_image`. Blocks.

    ``grow`` is called with the bytes that it takes in memory, before it is received.

    Raises:
        ServeError: those of ``decode_image``; media_decoder_failed; what ``grow`` raises.
        CancelledWorkError: ``cancellation`` is set.
    """
    (decoded,) = POOL.run("decode_image", [data], limits, None, cancellation, grow).frames
    return decoded


def video(
    data: bytes, limits: MediaSettings, fps: float | None, cancellation: Cancellation, grow: Grow = _ignore
) -> Frames:
    """Decodes a video; see :func:`~embferry.serve.media.video.decode_video`. Blocks. Raises as :func:`image`."""
    return POOL.run("decode_video", [data], limits, fps, cancellation, grow)


def frames(
    data: Sequence[bytes], fps: float, limits: MediaSettings, cancellation: Cancellation, grow: Grow = _ignore
) -> Frames:
    """Decodes frames; see :func:`~embferry.serve.media.video.decode_frames`. Blocks. Raises as :func:`image`."""
    return POOL.run("decode_frames", data, limits, fps, cancellation, grow)
