"""Videos: samples frames for the model, from a file (decoded with PyAV) or from a list of pictures."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.animation import animated, read_animation
from embferry.serve.media.checks import check_bytes
from embferry.serve.media.containers import decoded, opened, read_index
from embferry.serve.media.film import Film
from embferry.serve.media.formats import sniff
from embferry.serve.media.image import check_image, decode_image


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames of one size, mode RGB, ``fps`` of them per second."""

    frames: list[Image.Image]
    fps: float


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """``width`` and ``height`` in pixels; ``seconds`` from the start of the first to the end of the last frame."""

    width: int
    height: int
    seconds: float
    count: int


def check_video(data: bytes, limits: MediaSettings) -> VideoHeader:
    """Checks a video file without decoding its frames, and returns its header.

    Raises:
        ServeError: see :func:`decode_video`; damage within a frame is found only there.
    """
    check_bytes(data, limits)
    header = _header(_film(data, limits))
    _sampling(header, limits.video_fps, limits)
    return header


def decode_video(data: bytes, limits: MediaSettings, fps: float | None = None) -> Frames:
    """Samples frames of a video file evenly from its start, with its display matrix applied.

    Args:
        data: a file of one of the formats of :mod:`.formats`.
        limits: the settings.
        fps: frames to sample per second; ``limits.video_fps`` if None. The rate is lower if the file has fewer frames,
            or if the video would exceed ``limits.max_video_frames``.

    Raises:
        ServeError: media_too_large, media_empty, unsupported_media_type, wrong_media_kind, media_zero_size,
            media_side_too_long, media_aspect_ratio, media_too_many_pixels, video_truncated, video_corrupt,
            video_too_long.
    """
    rate, pictures = sampled_frames(data, limits, fps)
    return Frames([picture for picture, times in pictures for _ in range(times)], rate)


def sampled_frames(
    data: bytes, limits: MediaSettings, fps: float | None = None
) -> tuple[float, Iterator[tuple[Image.Image, int]]]:
    """Does what :func:`decode_video` does, and decodes each frame when it is asked for.

    Returns:
        Frames per second, and the frames, each with the number of times that it is sampled.
    """
    check_bytes(data, limits)
    film = _film(data, limits)
    count, rate = _sampling(_header(film), fps or limits.video_fps, limits)
    return rate, _of_one_size(_taken(data, film, list(_displayed(film.starts, count, rate)), limits))


def _taken(
    data: bytes, film: Film, wanted: Sequence[float], limits: MediaSettings
) -> Iterator[tuple[Image.Image, int]]:
    """Yields the frames that are on show at the times ``wanted``, ascending, each with how often it is wanted.

    A frame that the container announces and the decoder leaves out is replaced by the one before it, as a player does;
    where something is damaged in between, it is missing.
    """
    missing: list[float] = []
    damaged: list[float] = []
    before: tuple[float, Callable[[], Image.Image]] | None = None
    at = 0
    for start, frame in _frames(data, film, limits, damaged):
        if at == len(wanted):
            break
        late = bisect_left(wanted, start, at) - at
        yield from _shown(before, wanted[at : at + late], damaged, missing)
        at += late
        if exact := bisect_right(wanted, start, at) - at:
            yield frame(), exact
            at += exact
        before = (start, frame)
    yield from _shown(before, wanted[at:], damaged, missing)
    if missing:
        relative = sorted(time - film.starts[0] for time in {*damaged, *missing})
        span = f"between {relative[0]:.1f} and {relative[-1]:.1f} seconds"
        why = f"the {film.form} video is damaged {span}: {len(missing)} of {len(wanted)} sampled frames"
        raise ServeError("video_corrupt", f"{why} cannot be decoded; send a sound file")


def _shown(
    before: tuple[float, Callable[[], Image.Image]] | None,
    wanted: Sequence[float],
    damaged: Sequence[float],
    missing: list[float],
) -> Iterator[tuple[Image.Image, int]]:
    """Yields the frame ``before`` for the times of ``wanted`` up to which nothing is damaged; the rest are missing."""
    sound = 0
    if before is not None:
        first = min((time for time in damaged if time > before[0]), default=math.inf)
        sound = bisect_left(wanted, first)
        if sound:
            yield before[1](), sound
    missing += wanted[sound:]


def _film(data: bytes, limits: MediaSettings) -> Film:
    is_animation = not sniff(data, "video").reader
    return read_animation(data, limits) if is_animation else read_index(data, limits)


def _frames(
    data: bytes, film: Film, limits: MediaSettings, damaged: list[float]
) -> Iterator[tuple[float, Callable[[], Image.Image]]]:
    """Yields start and picture of each frame; see :func:`.containers.decoded`, also for ``damaged``."""
    if not sniff(data, "video").reader:
        yield from animated(data, film, limits)
        return
    with opened(data) as (container, _):
        yield from decoded(container, film, limits, damaged)


def check_frames(frames: Sequence[bytes], limits: MediaSettings) -> None:
    """Checks a list of frames without decoding their pixels.

    Raises:
        ServeError: too_many_frames, video_frame_sizes, media_empty, and those of check_image.
    """
    if not frames:
        raise ServeError("media_empty", "the video has no frames")
    if len(frames) > limits.max_video_frames:
        why = f"the video has {len(frames)} frames; the limit is {limits.max_video_frames} (media.max_video_frames)"
        raise ServeError("too_many_frames", why)
    sizes = [check_image(frame, limits) for frame in frames]
    _same_size(sizes)
    _check_total(len(frames), *sizes[0], limits)


def decode_frames(frames: Sequence[bytes], fps: float, limits: MediaSettings) -> Frames:
    """Decodes a video given as pictures, ``fps`` of them per second.

    Raises:
        ServeError: those of check_frames and decode_image; invalid_request for a rate that is not positive.
    """
    rate, pictures = frames_of(frames, fps, limits)
    return Frames([picture for picture, _ in pictures], rate)


def frames_of(
    frames: Sequence[bytes], fps: float, limits: MediaSettings
) -> tuple[float, Iterator[tuple[Image.Image, int]]]:
    """Does what :func:`decode_frames` does, and returns the same as :func:`sampled_frames`."""
    if not (math.isfinite(fps) and fps > 0):
        raise ServeError("invalid_request", f"a video needs a positive number of frames per second, not {fps}")
    check_frames(frames, limits)
    return fps, _of_one_size((decode_image(frame, limits), 1) for frame in frames)


def _of_one_size(pictures: Iterator[tuple[Image.Image, int]]) -> Iterator[tuple[Image.Image, int]]:
    first: tuple[int, int] | None = None
    for number, (picture, times) in enumerate(pictures):
        first = first or picture.size
        _same_size([first, picture.size], number)
        yield picture, times


def _same_size(sizes: Sequence[tuple[int, int]], number: int | None = None) -> None:
    """Checks that all sizes are the first. ``number``: that of the last one, if they are not all there."""
    for at, size in enumerate(sizes):
        if size != sizes[0]:
            first, other = ("{} × {}".format(*s) for s in (sizes[0], size))
            shown = at if number is None else number
            raise ServeError("video_frame_sizes", f"frame 0 is {first} pixels, frame {shown} is {other}")


def _header(film: Film) -> VideoHeader:
    return VideoHeader(film.width, film.height, film.seconds, len(film.starts))


def _sampling(header: VideoHeader, fps: float, limits: MediaSettings) -> tuple[int, float]:
    """Returns the number of frames to sample and their rate per second."""
    rate = min(fps, header.count / header.seconds, limits.max_video_frames / header.seconds)
    count = max(1, math.floor(header.seconds * rate + 1e-6))
    _check_total(count, header.width, header.height, limits)
    return count, rate


def _displayed(times: Sequence[float], count: int, rate: float) -> Iterator[float]:
    """For each of ``count`` sample times, yields the start time of the frame displayed at that moment."""
    at = 0
    for step in range(count):
        while at + 1 < len(times) and times[at + 1] - times[0] <= step / rate + 1e-6:
            at += 1
        yield times[at]


def _check_total(count: int, width: int, height: int, limits: MediaSettings) -> None:
    if count * width * height > limits.max_video_pixels:
        limit = f"{limits.max_video_pixels:,} pixels in total (media.max_video_pixels)"
        why = f"{count} frames of {width:,} × {height:,} pixels exceed {limit}; send fewer or smaller frames"
        raise ServeError("media_too_many_pixels", why)
