"""Headers of videos, as they are checked before FFmpeg sees the file: claims beyond it, and the work to find them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import cache, partial
from random import Random

import av
import numpy as np

from embferry.serve.media.headers import asf, avi, matroska, mp4, mpegts, ogg, positions
from embferry.serve.media.headers.claims import ClaimError

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Number, Tree, fresh, packed

CHECKS: dict[str, tuple[Callable[[bytes], object], ...]] = {
    "mp4": (mp4.check, mp4.codec, partial(positions.check, reader="mov")),
    "matroska": (matroska.check, matroska.codec, matroska.is_cut, partial(positions.check, reader="matroska")),
    "avi": (avi.check, avi.codec, avi.is_cut, partial(positions.check, reader="avi")),
    "asf": (asf.reduced, partial(positions.check, reader="asf")),
    "ogg": (ogg.check,),
    "mpegts": (mpegts.codec,),
}
STARTS = {b"RIFF": "avi", b"\x30\x26\xb2\x75": "asf", b"OggS": "ogg", b"G@\x11\x10": "mpegts"}
CODECS = {"asf": "wmv2", "ogg": "libvpx"}
TABLES = tuple(b"stts stsz stsc stco ctts elst stss stsd dref avih strh idx1".split())
CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta", b"LIST", b"RIFF")


class MediaVideos(Target):
    documented = (ClaimError,)
    inputs = 4000
    bounds = Bounds(calls=60_000, calls_per_byte=32, memory=1 << 20)

    def tree(self, chance: Random) -> Tree:
        return fresh(_parsed(chance.choice(tuple(CHECKS))))

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [packed(tree)]

    def run(self, pieces: Pieces) -> None:
        data = b"".join(pieces)
        refusal: ClaimError | None = None
        for check in CHECKS["mp4" if data[4:8] == b"ftyp" else STARTS.get(data[:4], "matroska")]:
            try:
                check(data)
            except ClaimError as error:  # the others get the file all the same
                refusal = error
        if refusal is not None:
            raise refusal


@cache
def _parsed(name: str) -> list[Tree]:
    """Returns a small video with the lengths and tables in it as numbers."""
    file = io.BytesIO()
    with av.open(file, "w", format=name) as container:
        stream = container.add_stream(CODECS.get(name, "mpeg4"), rate=5)
        stream.width = stream.height = 32
        for shade in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * shade, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = file.getvalue()
    match name:
        case "mp4":
            return _boxes(data)
        case "avi":
            return _chunks(data)
        case "asf":
            return [data[:30], *_objects(data[30:])]
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def _boxes(data: bytes) -> list[Tree]:
    """Splits the boxes of an MP4, and the tables in them into words."""
    found: list[Tree] = []
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + size]
        found.append([Number(size, 4), name, _boxes(body) if name in CONTAINERS else _words(name, body, ">")])
        at += size
    return found


def _chunks(data: bytes) -> list[Tree]:
    """Splits the chunks of an AVI, which begin with a name and a length."""
    found: list[Tree] = []
    at = 0
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + size]
        inner = [body[:4], *_chunks(body[4:])] if name in CONTAINERS else _words(name, body, "<")
        found.append([name, Number(size, 4, True), inner, b"\0" * (size % 2)])
        at += 8 + size + size % 2
    return found


def _objects(data: bytes) -> list[Tree]:
    """Splits the objects of an ASF file, which begin with 16 bytes for a name and a length."""
    found: list[Tree] = []
    at = 0
    while at + 24 <= len(data) and (size := int.from_bytes(data[at + 16 : at + 24], "little")) >= 24:
        body = data[at + 24 : at + size]
        words = [Number(word, 4, True) for (word,) in struct.iter_unpack("<I", body[: len(body[:80]) // 4 * 4])]
        found.append([data[at : at + 16], Number(size, 8, True), *words, body[4 * len(words) :]])
        at += size
    return [*found, data[at:]]


def _words(name: bytes, data: bytes, order: str) -> Tree:
    """Returns the first numbers of 32 bits of a table, and the rest; other data as they are."""
    if name not in TABLES:
        return data
    first = data[: min(len(data), 48) // 4 * 4]
    words = [Number(word, 4, order == "<") for (word,) in struct.iter_unpack(f"{order}I", first)]
    return [*words, data[len(first) :]]
