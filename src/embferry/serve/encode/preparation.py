"""Decodes media files into items ready for the encoder. Needs no model, and runs on threads of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from embferry.engine.media import MediaItem, MediaProcessor, PreparedItem, Video
from embferry.serve.config import MediaSettings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.media.image import decode_image
from embferry.serve.media.video import LISTED_FPS, decode_frames, decode_video


def prepare(
    items: Sequence[EncodeItem],
    media: MediaProcessor,
    limits: MediaSettings,
    prepared: Callable[[PreparedItem], object] = lambda item: None,
) -> list[PreparedItem]:
    """Decodes every item and cuts it into patches.

    Args:
        items: the media files.
        media: cuts them.
        limits: the settings.
        prepared: called with each item that is ready. What it raises ends the work.

    Raises:
        ServeError: a decoder of :mod:`embferry.serve.media` refuses the file.
        MediaError: the model does not support the size.
    """
    done = []
    for item in items:
        done.append(media.prepare(_decoded(item, limits)))
        prepared(done[-1])
    return done


def _decoded(item: EncodeItem, limits: MediaSettings) -> MediaItem:
    if item.kind == "image":
        return decode_image(item.data or b"", limits)
    if item.frames is not None:
        video = decode_frames(item.frames, item.fps or LISTED_FPS, limits)
    else:
        video = decode_video(item.data or b"", limits, item.fps)
    return Video(video.frames, video.fps)
