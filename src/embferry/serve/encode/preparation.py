"""Decodes media files into items ready for the encoder. Needs no model, and runs on threads of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from embferry.engine.media import MediaItem, MediaProcessor, PreparedItem, Video
from embferry.serve.config import MediaSettings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.media.decoding import media as decoding
from embferry.serve.media.decoding.cancellation import Cancellation
from embferry.serve.media.video import LISTED_FPS


def prepare(
    items: Sequence[EncodeItem],
    media: MediaProcessor,
    limits: MediaSettings,
    prepared: Callable[[PreparedItem], object] = lambda item: None,
    cancellation: Cancellation | None = None,
) -> list[PreparedItem]:
    """Decodes every item and cuts it into patches.

    Args:
        items: the media files.
        media: cuts them.
        limits: the settings.
        prepared: called with each item that is ready. What it raises ends the work.
        cancellation: ends the work from another thread.

    Raises:
        ServeError: a decoder of :mod:`embferry.serve.media` refuses the file.
        MediaError: the model does not support the size.
        CancelledWorkError: ``cancellation`` is set.
    """
    cancellation = cancellation or Cancellation()
    done = []
    for item in items:
        done.append(media.prepare(_decoded(item, limits, cancellation)))
        prepared(done[-1])
    return done


def _decoded(item: EncodeItem, limits: MediaSettings, cancellation: Cancellation) -> MediaItem:
    if item.kind == "image":
        return decoding.image(item.data or b"", limits, cancellation)
    if item.frames is not None:
        video = decoding.frames(item.frames, item.fps or LISTED_FPS, limits, cancellation)
    else:
        video = decoding.video(item.data or b"", limits, item.fps, cancellation)
    return Video(video.frames, video.fps)
