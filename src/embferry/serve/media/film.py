"""The facts about a video that are known before a frame of it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError

LISTED_FPS = 2.0
"""Frames per second of a list of pictures without ``fps``, and of pages; Qwen's own tools assume the same."""


@dataclass(frozen=True, slots=True)
class Film:
    """The stream of a video file that is shown.

    Attributes:
        form: the name of the file's format.
        stream: its index in the container; of an animation, the number of its first frame.
        width: in pixels, before the display matrix is applied.
        height: likewise.
        starts: when each frame begins, in seconds on the stream's clock, ascending; not empty.
        seconds: from the start of the first to the end of the last frame.
        in_order: the container does not say when frames are shown; only their order is known.
    """

    form: str
    stream: int
    width: int
    height: int
    starts: list[float]
    seconds: float
    in_order: bool


def too_long(seconds: float, limits: MediaSettings) -> ServeError:
    """Returns the error of a video of more than ``media.max_video_seconds``."""
    limit = f"{limits.max_video_seconds:,.0f} (media.max_video_seconds)"
    return ServeError("video_too_long", f"the video lasts {seconds:,.0f} seconds; the limit is {limit}")
