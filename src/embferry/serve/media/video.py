"""Videos: samples frames for the model, from a file (decoded with PyAV) or from a list of pictures."""

from __future__ import annotations

import io
import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.checks import check_bytes, check_size, exhausted, sniff
from embferry.serve.media.headers import avi, matroska, mp4
from embferry.serve.media.headers.claims import ClaimError
from embferry.serve.media.image import check_image, decode_image

LISTED_FPS = 2.0
"""Frames per second of a list of pictures without ``fps``; Qwen's own tools assume the same."""
_CLAIMS = {"mov": mp4.check, "matroska": matroska.check, "avi": avi.check}
SLACK = 0.5
"""Seconds by which the last frame may end before the duration in the header, since the sound may be longer."""


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
    with _opened(data) as (container, form):
        header, _ = _header(container, form, limits)
    _sampling(header, limits.video_fps, limits)
    return header


def decode_video(data: bytes, limits: MediaSettings, fps: float | None = None) -> Frames:
    """Samples frames of a video file evenly from its start, with its display matrix applied.

    Args:
        data: an MP4/MOV, WebM/Matroska, AVI or GIF file.
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
    with _opened(data) as (container, form):
        header, times = _header(container, form, limits)
    count, rate = _sampling(header, fps or limits.video_fps, limits)
    return rate, _of_one_size(_taken(data, count, Counter(_displayed(times, count, rate)), limits))


def _taken(data: bytes, count: int, wanted: Counter[float], limits: MediaSettings) -> Iterator[tuple[Image.Image, int]]:
    with _opened(data) as (container, _):
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            if frame.pts is not None and (times := wanted.pop(_seconds(frame.pts, stream), 0)):
                yield _picture(frame, limits), times
            if not wanted:
                break
    if wanted:
        raise ServeError("video_corrupt", f"{wanted.total()} of {count} sampled frames cannot be decoded")


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


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, str]]:
    """Opens a container; yields it and its format. Uses one demuxer: others (playlists) could open further files."""
    form = sniff(data, "video")
    if form.reader in _CLAIMS:
        try:
            _CLAIMS[form.reader](data)
        except ClaimError as error:
            code = "video_truncated" if error.truncated else "video_corrupt"
            raise ServeError(code, f"the {form.name} video is refused: {error}") from error
    try:
        with av.open(io.BytesIO(data), "r", format=form.reader, metadata_errors="replace") as container:
            yield container, form.name
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise exhausted("video", error) from error
        truncated = isinstance(error, av.error.EOFError) or (form.reader == "mov" and _box_cut(data))
        code = "video_truncated" if truncated else "video_corrupt"
        reason = getattr(error, "strerror", None) or "invalid data"
        raise ServeError(code, f"the {form.name} video cannot be decoded: {reason}") from error


def _box_cut(data: bytes) -> bool:
    """Returns whether an MP4's boxes (ISO/IEC 14496-12, 4.2) exceed the file, or its index is missing."""
    at, names = 0, set()
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1 and at + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, at + 8)
        names.add(name)
        if size < 8:  # 0: the last box, which reaches to the end; 1 to 7 are invalid
            break
        at += size
    return at > len(data) or b"moov" not in names


def _header(container: Any, form: str, limits: MediaSettings) -> tuple[VideoHeader, list[float]]:
    """Returns the header and the start times of all frames in seconds, ascending. Decodes no packets."""
    if not container.streams.video:
        raise ServeError("video_corrupt", f"the {form} file has no video stream")
    stream = container.streams.video[0]
    check_size(stream.codec_context.width, stream.codec_context.height, limits)
    claimed = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
    if claimed > limits.max_video_seconds:
        raise _too_long(float(claimed), limits)
    starts: list[float] = []
    last = 0.0
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        start = _seconds(packet.pts, stream)
        starts.append(start)
        last = max(last, _seconds(packet.pts + (packet.duration or 0), stream))
        if last - starts[0] > limits.max_video_seconds:
            raise _too_long(last - starts[0], limits)
    starts.sort()
    if not starts or (stream.frames and len(starts) < stream.frames) or last - starts[0] < claimed - SLACK:
        total = f" of {stream.frames}" if stream.frames else ""
        why = f"the {form} video ends after {len(starts)}{total} frames; send the complete file"
        raise ServeError("video_truncated", why)
    seconds = max(last - starts[0], 1e-3)
    return VideoHeader(stream.codec_context.width, stream.codec_context.height, seconds, len(starts)), starts


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


def _seconds(pts: int, stream: Any) -> float:
    return float(pts * stream.time_base)


def _picture(frame: Any, limits: MediaSettings) -> Image.Image:
    check_size(frame.width, frame.height, limits)  # a stream may change its size midway
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _too_long(seconds: float, limits: MediaSettings) -> ServeError:
    limit = f"{limits.max_video_seconds:,.0f} (media.max_video_seconds)"
    return ServeError("video_too_long", f"the video lasts {seconds:,.0f} seconds; the limit is {limit}")
