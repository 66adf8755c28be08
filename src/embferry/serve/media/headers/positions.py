"""Positions in video files to which a demuxer seeks: they must have 31 bits.

OpenCV passes FFmpeg's positions on as numbers of 32 bits with a sign. A larger position becomes negative, which
ends a process in which OpenCV reads from memory. So lengths and offsets that lead there are refused. A chunk that is
shorter than its fields is refused too: a demuxer takes the rest of it for four gigabytes.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping

from embferry.serve.media.headers.claims import ClaimError

LIMIT = 1 << 31
MAX_PARTS = 300_000
"""Boxes, elements, chunks or objects that are looked at."""
MAX_DEPTH = 16

Part = tuple[bytes, int, int]
"""Name, beginning and end of the content of a part. The end may lie beyond the file."""


class _Parts:
    """Counts the parts of a file."""

    def __init__(self) -> None:
        self._left = MAX_PARTS

    def count(self, depth: int) -> None:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            raise ClaimError("it has too many parts, or they are nested too deep")


def check(data: bytes, reader: str) -> None:
    """Checks a video file.

    Args:
        data: the file.
        reader: FFmpeg's demuxer for it. A demuxer that never seeks to a position from the file needs no check.

    Raises:
        ClaimError: a length or an offset leads to a position of more than 31 bits.
    """
    if reader in _CHECKS:
        _CHECKS[reader](data)


def _within(position: int, what: str) -> None:
    if not 0 <= position < LIMIT:
        raise ClaimError(f"{what} leads to the position {position:,}, which no file of this size has")


def _numbers(code: str, data: bytes, order: str) -> array[int]:
    """Returns the numbers of a table. A part of one at the end is left out. ``code``: of :mod:`array`."""
    numbers = array(code)
    numbers.frombytes(data[: len(data) // numbers.itemsize * numbers.itemsize])
    if order != sys.byteorder:
        numbers.byteswap()
    return numbers


# MP4 and QuickTime (ISO/IEC 14496-12)

_BOXES = frozenset(b"moov trak mdia minf stbl edts dinf udta moof traf mvex sinf schi clip wave tref".split())


def _mp4(data: bytes) -> None:
    fragment = each = 0
    for name, at, end in _mp4_boxes(memoryview(data), 0, len(data), 0, _Parts()):
        body = data[at : min(end, len(data))] if name in _READ else b""
        if name == b"moof":
            fragment = at
        elif name == b"trex":
            each = max(each, int.from_bytes(body[16:20]))
        elif name == b"trun":
            _check_run(body, fragment, each)
        elif name in _OFFSETS:
            each = max(each, _default_size(body)) if name == b"tfhd" else each
            for offset in _OFFSETS[name](body, end):
                _within(offset, f"its box {name.decode()}")


def _check_run(body: bytes, fragment: int, each: int) -> None:
    """A run of samples: where it begins, and the lengths of the samples. ``each``: of those that have none."""
    if len(body) < 8:
        return
    flags, count = struct.unpack_from(">II", body)
    at = 8
    if flags & 1:
        fragment += int.from_bytes(body[8:12], signed=True)
        at += 4
    _within(fragment, "a run of samples")
    at += flags & 4
    width = 4 * (flags & 0xF00).bit_count()
    if not flags & 0x200:
        _within(fragment + count * each, "a run of samples")
        return
    sizes = _numbers("I", body[at + (flags >> 6 & 4) :], "big")[:: width // 4]
    _within(fragment + sum(sizes), "a run of samples")


def _default_size(body: bytes) -> int:
    """Returns the length of samples that a fragment gives for all of them; 0 if it gives none."""
    if len(body) < 8 or not body[3] & 0x10:
        return 0
    at = 8 + 8 * (body[3] & 1) + 2 * (body[3] & 2) + (body[3] & 8) // 2
    return int.from_bytes(body[at : at + 4])


def _mp4_boxes(data: memoryview, at: int, end: int, depth: int, parts: _Parts) -> Iterator[Part]:
    while at + 8 <= end:
        parts.count(depth)
        size, head, name = int.from_bytes(data[at : at + 4]), 8, bytes(data[at + 4 : at + 8])
        if size == 1 and at + 16 <= end:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        size = size or end - at
        if size < head:
            return  # the demuxer stops here too
        _within(at + size, f"its box {name!r}")
        yield name, at + head, at + size
        if name in _BOXES:
            yield from _mp4_boxes(data, at + head, min(at + size, end), depth + 1, parts)
        at += size


def _table(code: str) -> Callable[[bytes, int], Iterator[int]]:
    def offsets(body: bytes, end: int) -> Iterator[int]:
        yield max(_numbers(code, body[8:], "big"), default=0)

    return offsets


def _base(body: bytes, end: int) -> Iterator[int]:
    if len(body) >= 16 and body[3] & 1:
        yield int.from_bytes(body[8:16])


def _segments(body: bytes, end: int) -> Iterator[int]:
    """An index of segments: the first offset, and lengths that follow one another."""
    wide = body[:1] > b"\0"
    at, entries = (20, 32) if wide else (16, 24)
    offset = end + int.from_bytes(body[at : at + (8 if wide else 4)])
    yield offset
    for entry in range(entries, len(body) - 11, 12):
        offset += int.from_bytes(body[entry : entry + 4]) & 0x7FFFFFFF
        yield offset


def _entries(body: bytes, end: int) -> Iterator[int]:
    """A list of entries, each with its length: where each ends."""
    at, last = 8, len(body)
    while at + 4 <= last:
        size = int.from_bytes(body[at : at + 4])
        yield end - last + at + size
        at += max(size, 4)


_OFFSETS: Mapping[bytes, Callable[[bytes, int], Iterator[int]]] = {
    b"stco": _table("I"),
    b"co64": _table("Q"),
    b"tfhd": _base,
    b"sidx": _segments,
    b"dref": _entries,
    b"stsd": _entries,
}
_READ = frozenset((*_OFFSETS, b"trun", b"trex"))


# AVI

_SHORTEST = {b"avih": 28, b"strh": 48, b"LIST": 4, b"RIFF": 4}
"""The fields that a demuxer takes from a chunk without a look at its length."""
_FRAMES = b"movi"


def _avi(data: bytes) -> None:
    for name, at, end in _avi_chunks(data, 0, len(data), 0, _Parts()):
        if name == b"idx1":
            fields = _numbers("I", data[at : min(end, len(data))], "little")
            furthest = max(fields[2::4], default=0) + max(fields[3::4], default=0)
            _within(at + furthest, "its index")  # offsets count from the file's beginning, or the frames'
        elif name == b"indx" or name[:2] == b"ix":
            _avi_index(data[at : min(end, len(data))])


def _avi_chunks(data: bytes, at: int, end: int, depth: int, parts: _Parts) -> Iterator[Part]:
    while at + 8 <= end:
        parts.count(depth)
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        _within(at + 16 + size, f"its chunk {name!r}")
        if size < _SHORTEST.get(name, 0):
            raise ClaimError(f"its chunk {name.decode()} has {size} bytes, fewer than its fields")
        yield name, at + 8, at + 8 + size
        if name in (b"RIFF", b"LIST") and data[at + 8 : at + 12] != _FRAMES:
            yield from _avi_chunks(data, at + 12, min(at + 8 + size, end), depth + 1, parts)
        at += 8 + size + size % 2


def _avi_index(body: bytes) -> None:
    """An index of OpenDML: of frames, with a base and offsets, or of such indexes."""
    if len(body) < 24:
        return
    if body[3] == 0:
        offsets = _numbers("Q", body[24:], "little")[::2]
        _within(max(offsets, default=0), "its index")
        return
    base = int.from_bytes(body[12:20], "little")
    _within(base + max(_numbers("I", body[24:], "little")[::2], default=0), "its index")


# Matroska and WebM (RFC 9559)

_SEGMENT = b"\x18\x53\x80\x67"
_POSITIONS = (b"\x53\xac", b"\xf1", b"\xf0")
"""Positions in a list of the parts, and in the index."""
_HOLDERS = frozenset((
    _SEGMENT, b"\x1a\x45\xdf\xa3", b"\x11\x4d\x9b\x74", b"\x4d\xbb", b"\x1c\x53\xbb\x6b", b"\xbb", b"\xb7",
    b"\x16\x54\xae\x6b", b"\xae", b"\x15\x49\xa9\x66",
))  # fmt: skip
"""Elements whose content is looked at. That of a cluster, which holds frames, cannot lead beyond its end."""


def _matroska(data: bytes) -> None:
    begin = 0
    for name, at, end in _elements(data, 0, len(data), 0, _Parts()):
        if name == _SEGMENT:
            begin = at
        elif name in _POSITIONS:
            _within(begin + int.from_bytes(data[at : min(end, at + 8)]), "its index")


def _elements(data: bytes, at: int, end: int, depth: int, parts: _Parts) -> Iterator[Part]:
    while at < end:
        parts.count(depth)
        width = 9 - data[at].bit_length()
        name, at = data[at : at + width], at + width
        if width > 4 or at >= end:
            return  # no element, or cut off: the demuxer says so
        width = 9 - data[at].bit_length()
        if width > 8 or at + width > end:
            return
        size = int.from_bytes(data[at : at + width]) & ((1 << 7 * width) - 1)
        unknown, at = size == (1 << 7 * width) - 1, at + width
        if not unknown:
            _within(at + size, "an element")
        yield name, at, at if unknown else at + size
        if unknown:
            continue  # its content is read as if it stood beside it
        if name in _HOLDERS:
            yield from _elements(data, at, min(at + size, end), depth + 1, parts)
        at += size


# ASF and WMV; the objects of the header are checked by :mod:`.asf`

_HEAD_BYTES, _OBJECT_BYTES = 30, 24


def _asf(data: bytes) -> None:
    at, parts = 0, _Parts()
    while at + _OBJECT_BYTES <= len(data):
        parts.count(0)
        size = int.from_bytes(data[at + 16 : at + 24], "little")
        _within(at + size, "an object")
        if size < _OBJECT_BYTES:
            return
        at += size


_CHECKS: Mapping[str, Callable[[bytes], None]] = {"mov": _mp4, "avi": _avi, "matroska": _matroska, "asf": _asf}
