"""Bytes → items ready for the encoder. Runs on its own threads: decoding a video takes a while, and needs no model."""

from __future__ import annotations

from collections.abc import Sequence

from embferry.engine.media import MediaItem, MediaProcessor, PreparedItem, Video
from embferry.serve.config import MediaSettings
from embferry.serve.encode.wire import EncodeItem
from embferry.serve.media.image import decode_image
from embferry.serve.media.video import Frames, decode_frames, decode_video

DEFAULT_FRAME_RATE = 2.0
"""Frames a second of a list of pictures that does not say; what Qwen's own tools assume."""


def prepare(items: Sequence[EncodeItem], media: MediaProcessor, limits: MediaSettings) -> list[PreparedItem]:
    """
    Raises:
        ServeError: what the decoders of :mod:`embferry.serve.media` refuse.
        MediaError: a size the model does not take.
    """
    return [media.prepare(_decoded(item, limits)) for item in items]


def _decoded(item: EncodeItem, limits: MediaSettings) -> MediaItem:
    if item.frames is not None:
        return _video(decode_frames(item.frames, item.fps or DEFAULT_FRAME_RATE, limits))
    data = item.data or b""
    if item.kind == "video":
        return _video(decode_video(data, limits, item.fps))
    return decode_image(data, limits)


def _video(frames: Frames) -> Video:
    return Video(frames.frames, frames.fps)
