"""Generators of videos as cameras, editors and browsers write them, valid and damaged."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SOUNDS = {"mp4": "aac", "mov": "aac", "flv": "aac", "mpegts": "aac", "mpeg": "mp2"}
"""The codec of sound of a container; libopus or libmp3lame of the others."""
SIZE = (64, 48)


def film(
    form: str = "mp4",
    codec: str = "libx264",
    frames: int = 20,
    rate: int = 10,
    *,
    gop: int = 5,
    hidden: int = 0,
    cut_head: int = 0,
    sound: float = 0,
    still: str | None = None,
    muxer: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
) -> bytes:
    """Returns a video whose frame ``n`` is grey of brightness ``10 n % 256``.

    Args:
        form: the container, named as in FFmpeg.
        codec: likewise.
        frames: their number.
        rate: frames a second.
        gop: frames from one that is whole to the next.
        hidden: the first frames that an edit list hides, as of a video that was trimmed without encoding.
        cut_head: packets that are left out at the beginning, without an edit list.
        sound: seconds of silence.
        still: ``cover``: a cover picture; ``track``: a first stream of one small picture.
        muxer: options of the container.
        encoder: options of the codec.
    """
    with (
        tempfile.NamedTemporaryFile() as file,  # the index of an MP4 is moved to its beginning in files only
        av.open(file.name, "w", format=form, options=muxer or {}) as container,
    ):
        picture = _add_still(container, is_cover=still == "cover") if still else None
        stream = container.add_stream(codec, rate=rate, options=encoder or {})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.thread_type = "NONE"
        stream.codec_context.gop_size = gop
        silence = _silence(container, form) if sound else None
        if picture:
            container.mux([*picture.encode(grey(25, (16, 16)).reformat(format="yuvj420p")), *picture.encode()])
        packets = [packet for number in range(frames) for packet in stream.encode(grey(number))]
        for packet in [*packets, *stream.encode()][cut_head:]:
            shift = int(Fraction(hidden, rate) / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            container.mux(packet)
        if silence:
            for at in range(0, int(sound * 48_000), 960):
                container.mux(silence.encode(_silent_frame(at)))
            container.mux(silence.encode())
        container.close()
        return Path(file.name).read_bytes()


def grey(number: int, size: tuple[int, int] = SIZE) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), number * 10 % 256, np.uint8), format="rgb24")


def damaged(data: bytes, first: int, last: int, form: str | None = None) -> bytes:
    """Returns a video with the content of some packets, counted in the order of decoding, overwritten."""
    with av.open(io.BytesIO(data), format=form) as container:
        places = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    broken = bytearray(data)
    for at, size in places[first : last + 1]:
        broken[at + 4 : at + size] = b"\xaa" * (size - 4)
    return bytes(broken)


def with_boxes(data: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """Returns an MP4, whose index is at the end, with the boxes in ``moov`` changed."""
    *others, moov = boxes(data)
    assert moov[4:8] == b"moov"
    inner = b"".join(change(boxes(moov[8:])))
    return b"".join(others) + (8 + len(inner)).to_bytes(4) + b"moov" + inner


def boxes(data: bytes) -> list[bytes]:
    """Splits boxes of an MP4."""
    found, at = [], 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4])
        found.append(data[at : at + size])
        at += size
    return found


def _add_still(container: av.container.OutputContainer, *, is_cover: bool) -> av.VideoStream:
    stream: av.VideoStream = container.add_stream("mjpeg", rate=1)
    stream.width = stream.height = 16
    stream.pix_fmt = "yuvj420p"
    if is_cover:
        stream.disposition = av.stream.Disposition.attached_pic
    return stream


def _silence(container: av.container.OutputContainer, form: str) -> av.AudioStream:
    name = SOUNDS.get(form, "libopus" if form in ("webm", "matroska", "ogg") else "libmp3lame")
    stream: av.AudioStream = container.add_stream(name, rate=48_000)
    return stream


def _silent_frame(at: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 48_000, at
    return frame
