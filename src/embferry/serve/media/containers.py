"""Video files as FFmpeg reads them: the stream to show, when its frames begin, and the frames that decode."""

from __future__ import annotations

import io
import statistics
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import av
from av.sidedata.sidedata import Type as SideData
from PIL import Image

from embferry.protocol.text import printable
from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.checks import check_size, exhausted
from embferry.serve.media.film import Film, too_long
from embferry.serve.media.formats import sniff, still_picture
from embferry.serve.media.headers import asf, avi, gif, jpeg, matroska, mp4, mpegts, ogg
from embferry.serve.media.headers.claims import ClaimError

_CLAIMS: Mapping[str, Callable[[bytes], None]] = {
    "mov": mp4.check,
    "matroska": matroska.check,
    "avi": avi.check,
    "ogg": ogg.check,
}
_REDUCED: Mapping[str, Callable[[bytes], bytes]] = {
    "asf": asf.reduced,
    "gif": lambda data: gif.on_white(gif.with_screen(data)),
}
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "flv": {"fflags": "ignidx"},  # memory for its index is reserved by a count in it
    "mpegts": {"max_streams": "64"},
    "mpeg": {"max_streams": "64"},
}
"""Options of demuxers that bound what a header without a check here may claim."""
_IS_CUT: Mapping[str, Callable[[bytes], bool]] = {"matroska": matroska.is_cut, "avi": avi.is_cut}
_CODECS: Mapping[str, Callable[[bytes], str]] = {
    "mov": mp4.codec,
    "matroska": matroska.codec,
    "avi": avi.codec,
    "mpegts": mpegts.codec,
}
_PICTURES_IN_PS = range(0x1E0, 0x1F0)
"""The numbers of the streams of pictures (ISO/IEC 13818-1, table 2-22), also where FFmpeg takes them for sound."""
_MJPEG = ("mjpeg", "mjpegb", "mxpeg", "amv", "avrn", "smvjpeg", "jpegls")
"""Codecs whose packets are JPEG pictures."""
_MATRIX = struct.Struct("=9i")
_TURNS: Mapping[tuple[int, int, int, int], Image.Transpose | None] = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""The turns, by a, b, c and d of a display matrix (ISO/IEC 14496-12, 6.2.2)."""
MAX_ROTATIONS = 8
"""Rotations of one stream; frames with further ones stay as they are."""
SLACK = 0.5
"""Seconds by which the last frame may end before the announced end where the container is damaged."""


@contextmanager
def opened(data: bytes) -> Iterator[tuple[Any, str]]:
    """Opens a container; yields it and its format. Uses one demuxer: others (playlists) could open further files.

    Raises:
        ServeError: media_empty, unsupported_media_type, wrong_media_kind, video_truncated, video_corrupt.
    """
    form = sniff(data, "video")
    try:
        if form.reader in _CLAIMS:
            _CLAIMS[form.reader](data)
        if form.reader in _REDUCED:
            data = _REDUCED[form.reader](data)
    except ClaimError as error:
        if error.truncated:
            raise _truncated(form.name, f": {error}") from error
        raise ServeError("video_corrupt", f"the {form.name} video is refused: {error}") from error
    options = dict(_OPTIONS.get(form.reader, {}))
    try:
        with av.open(io.BytesIO(data), format=form.reader, metadata_errors="replace", options=options) as container:
            yield container, form.name
    except av.error.FFmpegError as error:
        _raise_if_exhausted(error)
        if isinstance(error, av.error.EOFError) or _ends_early(form.reader, data):
            lacks_index = form.reader == "mov" and b"moov" not in data
            raise _truncated(form.name, ": its index (moov) is missing" if lacks_index else "") from error
        reason = getattr(error, "strerror", None) or "invalid data"
        raise ServeError("video_corrupt", f"the {form.name} video cannot be decoded: {reason}") from error


def read_index(data: bytes, limits: MediaSettings) -> Film:
    """Reads all packets of the stream to show, and decodes none.

    Only the stream's own packets count. The duration of the container may be the sound's, and an edit list may hide
    packets.

    Raises:
        ServeError: those of :func:`opened`; wrong_media_kind, media_side_too_long, media_aspect_ratio,
            media_too_many_pixels, video_too_long.
    """
    with opened(data) as (container, form):
        stream = _stream(container, form, data)
        width, height = stream.codec_context.width, stream.codec_context.height
        _check_known(width, height, stream, form, data)
        check_size(width, height, limits)
        starts, seconds, in_order = _starts(container, stream, form, limits)
        reader = sniff(data, "video").reader
        if reader == "gif" and len(starts) == 1 and not gif.is_animated(data):
            raise still_picture(form)
        is_cut = (reader in _IS_CUT and _IS_CUT[reader](data)) or (
            reader not in _REDUCED and _index_cut(stream, len(data))
        )
        if is_cut or (not starts and _ends_early(reader, data)):
            count = f"{len(starts)} frame{'s' * (len(starts) != 1)}"
            raise _truncated(form, f", after {count}" if starts else ", before its first frame")
        if not starts:
            raise ServeError("video_corrupt", f"the {form} video has no frames that are shown")
        return Film(form, stream.index, width, height, starts, seconds, in_order)


def decoded(
    container: Any, film: Film, limits: MediaSettings, damaged: list[float]
) -> Iterator[tuple[float, Callable[[], Image.Image]]]:
    """Yields when each frame that decodes begins, in seconds, ascending, and a function that returns its picture.

    Args:
        container: the file, as it was opened.
        film: the stream.
        limits: the settings.
        damaged: gets the times of what does not decode, or only with parts made up.
    """
    stream = container.streams[film.stream]
    stream.thread_type = "NONE"
    turns = _Turns()
    last, count = -float("inf"), 0
    lost: list[float] = []
    for packet in _packets(container, stream):
        try:
            _check_scans(packet, stream, film.form, limits)
            frames = packet.decode()
        except av.error.FFmpegError as error:
            _raise_if_exhausted(error)
            if (at := _start(packet)) is not None:
                lost.append(at)
                damaged.append(at)
            continue
        for frame in frames:
            if frame.pts is None:
                continue
            start = float(frame.pts * stream.time_base)
            if film.in_order:  # frames have the time of the packet that they came in: later ones come in its place
                place = count + sum(time < start for time in lost)
                start, count = film.starts[min(place, len(film.starts) - 1)], count + 1
            if start <= last:
                continue
            if frame.is_corrupt:
                damaged.append(start)
                continue
            last = start
            yield start, partial(_picture, frame, turns, limits)


def _check_known(width: int, height: int, stream: Any, form: str, data: bytes) -> None:
    """Checks that the size of the pictures is known: in MPEG-TS, say, only headers within the stream have it.

    Raises:
        ServeError: video_corrupt, video_truncated.
    """
    if width > 0 and height > 0:
        return
    if _ends_early(sniff(data, "video").reader, data):
        raise _truncated(form, ", within its headers")
    name = printable(stream.codec_context.name, 40)
    raise ServeError(
        "video_corrupt", f"the {form} video has no header of its {name} stream that says how large its pictures are"
    )


class _Turns:
    """How to make the frames of one stream upright.

    A frame and its side data, once that was asked for, keep each other alive until Python looks for such circles. So it
    is asked for once for each rotation, which most streams have one of.
    """

    def __init__(self) -> None:
        self._known: dict[int, Image.Transpose | None] = {}

    def of(self, frame: Any) -> Image.Transpose | None:
        if frame.rotation not in self._known:
            self._known[frame.rotation] = _turn(frame) if len(self._known) < MAX_ROTATIONS else None
        return self._known[frame.rotation]


def _picture(frame: Any, turns: _Turns, limits: MediaSettings) -> Image.Image:
    check_size(frame.width, frame.height, limits)  # a stream may change its size midway
    image: Image.Image = frame.to_image()
    turn = turns.of(frame)
    return image if turn is None else image.transpose(turn)


def _turn(frame: Any) -> Image.Transpose | None:
    """Returns how to make a frame upright: the nearest to its display matrix of four turns, with and without a mirror.

    None: it is upright, or its matrix makes a line or a point of it.
    """
    found = frame.side_data.get(SideData.DISPLAYMATRIX)
    if found is None or found.buffer_size < _MATRIX.size:
        return None
    # The point (x, y), y downwards, is shown at (a x + c y, b x + d y), moved by the rest of the matrix.
    a, b, _, c, d, *_ = _MATRIX.unpack_from(bytes(found))
    if a * d == b * c:
        return None
    nearest = max(_TURNS, key=lambda turn: sum(x * y for x, y in zip(turn, (a, b, c, d), strict=True)))
    return _TURNS[nearest]


def _stream(container: Any, form: str, data: bytes) -> Any:
    """Returns the stream to show: FFmpeg's choice, but no attached picture and none without a decoder."""
    films = [stream for stream in container.streams.video if not stream.disposition & _ATTACHED]
    readable = [stream for stream in films if stream.codec_context is not None]
    if readable:
        best = container.streams.best("video")
        return next((stream for stream in readable if best is not None and stream.index == best.index), readable[0])
    reader = sniff(data, "video").reader
    if _ends_early(reader, data):
        raise _truncated(form, ", within its headers")
    if films or _is_nameless(container, reader):
        codec = printable((_CODECS[reader](data) if reader in _CODECS else "") or "unknown", 40)
        why = f"the codec of the {form} video ({codec}) is not read here; send it as H.264, HEVC, VP9 or AV1"
        raise ServeError("unsupported_media_type", why)
    only = ", only an attached picture" if container.streams.video else ""
    raise ServeError("video_corrupt", f"the {form} file has no video stream{only}")


def _is_nameless(container: Any, reader: str) -> bool:
    """Returns whether a stream may have pictures of a codec that FFmpeg does not know, and so does not call it one."""
    if reader == "mpeg":
        return any(stream.id in _PICTURES_IN_PS for stream in container.streams)
    return reader == "mpegts" and any(stream.type in ("data", "unknown") for stream in container.streams)


_ATTACHED = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails


def _starts(container: Any, stream: Any, form: str, limits: MediaSettings) -> tuple[list[float], float, bool]:
    """Returns the starts of the frames that are shown, the seconds that they last, and whether only order is known."""
    starts: list[float] = []
    first_key: float | None = None
    last, length, in_order = 0.0, 0.0, form == "AVI"
    for packet in _packets(container, stream, _announced(container, stream)):
        start = _start(packet)
        if start is None:
            continue
        in_order |= packet.pts is None
        if packet.is_keyframe and first_key is None:
            first_key = start
        if packet.is_discard:
            continue
        starts.append(start)
        if start >= last or len(starts) == 1:
            last, length = start, float((packet.duration or 0) * stream.time_base)
        if last - starts[0] > limits.max_video_seconds:
            raise too_long(last - starts[0], limits)
    starts.sort()
    if first_key is not None:  # what comes before the first whole frame cannot be decoded; players pass over it
        starts = starts[bisect_left(starts, first_key) :]
    if not starts:
        return [], 0.0, in_order
    if not length and len(starts) > 1:
        length = statistics.median(later - earlier for earlier, later in pairwise(starts))
    seconds = max(last + length - starts[0], 1e-3)
    if seconds > limits.max_video_seconds:
        raise too_long(seconds, limits)
    return starts, seconds, in_order


def _packets(container: Any, stream: Any, announced: float = 0.0) -> Iterator[Any]:
    """Yields the packets of a stream. Damage of the container ends them, if little of the announced time is missing."""
    last: float | None = None
    try:
        for packet in container.demux(stream):
            last = _start(packet) or last
            yield packet
    except av.error.FFmpegError as error:
        _raise_if_exhausted(error)
        if last is None or last < announced - SLACK:
            raise


def _announced(container: Any, stream: Any) -> float:
    """Returns the end of a stream by the headers, in seconds on its clock; 0 if they do not say."""
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    return float((container.duration or 0) / av.time_base)


def _start(packet: Any) -> float | None:
    at = packet.pts if packet.pts is not None else packet.dts
    return None if at is None else float(at * packet.time_base)


def _check_scans(packet: Any, stream: Any, form: str, limits: MediaSettings) -> None:
    """Checks the number of scans of a frame that is a JPEG picture.

    Raises:
        ServeError: video_corrupt.
    """
    if stream.codec_context.name in _MJPEG and packet.size:
        try:
            jpeg.check(bytes(packet), limits.max_pixels)
        except ClaimError as error:
            raise ServeError("video_corrupt", f"a frame of the {form} video is refused: {error}") from error


def _index_cut(stream: Any, size: int) -> bool:
    """Returns whether the container's index names packets beyond the end of the file."""
    return any(entry.pos + entry.size > size for entry in stream.index_entries)


def _truncated(form: str, why: str) -> ServeError:
    return ServeError("video_truncated", f"the {form} video ends too early{why}; send the complete file")


def _ends_early(reader: str, data: bytes) -> bool:
    """Returns whether a file that cannot be read is shorter than its own headers say."""
    match reader:
        case "mov":
            return _box_cut(data) or b"mvex" in data  # which announces fragments
        case "matroska":
            return matroska.is_cut(data)
        case "avi":
            return int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "asf":
            return int.from_bytes(data[16:24], "little") > len(data)
        case _:
            return False


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


def _raise_if_exhausted(error: Exception) -> None:
    if isinstance(error, MemoryError):
        raise exhausted("video", error) from error
