"""Matroska and WebM files (RFC 9559): the elements beside the frames are counted, as a decoder keeps one record each.

An empty element of two bytes becomes a record of hundreds. Clusters, which hold the frames, are passed over.
"""

from __future__ import annotations

import re

from embferry.serve.media.headers.claims import ClaimError

MAX_ELEMENTS = 200_000
MAX_DEPTH = 12
MAX_FRAMES = 1_000_000
MAX_TRACKS = 64
_TRACK, _SIMPLE_BLOCK, _GROUP = 0xAE, 0xA3, 0xA0
_NAMES = """
18538067 1A45DFA3 114D9B74 4DBB 1549A966 6924 1654AE6B AE E0 E1 55B0 55D0 7670 6D80 6240 5034 5035 47E7 E2 E3 E4 E8 E9
41E4 6624 1C53BB6B BB B7 DB 1941A469 61A7 1043A770 45B9 B6 8F 80 6944 6911 1254C367 7373 63C0 67C8
"""
_HOLDERS = frozenset(int(name, 16) for name in _NAMES.split())
"""Elements that hold elements."""
_SEGMENT = 0x18538067
_CODEC = re.compile(rb"\x86[\x82-\xbf](V_[A-Z0-9_/]{1,40})")
_UNKNOWN = -1
"""The length of a segment or cluster that is being written while it is sent."""


def check(data: bytes) -> None:
    """Checks the claims of a Matroska or WebM file.

    Raises:
        ClaimError: the file has more elements or tracks than is read.
    """
    _Scan(data).elements(0, len(data), 0)


def codec(data: bytes) -> str:
    """Returns the name of the first codec of pictures; empty if there is none."""
    found = _CODEC.search(data)
    return found[1].decode() if found else ""


def is_cut(data: bytes) -> bool:
    """Returns whether the segment, which holds all frames, reaches beyond the end of the file."""
    scan, at = _Scan(data), 0
    while at < len(data):
        name, at = scan._name(at, len(data))
        size, at = scan._size(at, len(data))
        if at > len(data) or name == 0 or size == _UNKNOWN:
            return False
        if name == _SEGMENT:
            return at + size > len(data)
        at += size
    return False


class _Scan:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.seen = self.tracks = self.frames = 0

    def elements(self, at: int, end: int, depth: int) -> None:
        """Reads the elements from ``at`` to ``end``. One that reaches beyond ``end`` is read up to there."""
        if depth > MAX_DEPTH:
            raise ClaimError(f"its elements are nested more than {MAX_DEPTH} deep")
        while at < end:
            name, at = self._name(at, end)
            size, at = self._size(at, end)
            if at > end or name == 0:
                return  # cut off, or no element: the decoder says so
            if name in (_SIMPLE_BLOCK, _GROUP):  # in a cluster of unknown length: frames, each with bytes of its own
                at += max(0, size)
                self.frames += 1
                if self.frames > MAX_FRAMES:
                    raise ClaimError(f"it has more than {MAX_FRAMES:,} frames")
                continue
            self.seen += 1
            if self.seen > MAX_ELEMENTS:
                raise ClaimError(f"it has more than {MAX_ELEMENTS:,} elements beside its frames")
            if name == _TRACK:
                self.tracks += 1
                if self.tracks > MAX_TRACKS:
                    raise ClaimError(f"it has more than {MAX_TRACKS} tracks")
            if size == _UNKNOWN:
                continue  # what it holds is read as if it stood beside it
            if name in _HOLDERS:
                self.elements(at, min(at + size, end), depth + 1)
            at += size

    def _name(self, at: int, end: int) -> tuple[int, int]:
        length = 9 - self.data[at].bit_length()
        if length > 4 or at + length > end:
            return 0, end
        return int.from_bytes(self.data[at : at + length]), at + length

    def _size(self, at: int, end: int) -> tuple[int, int]:
        if at >= end:
            return 0, end + 1
        length = 9 - self.data[at].bit_length()
        if length > 8 or at + length > end:
            return 0, end + 1
        size = int.from_bytes(self.data[at : at + length]) & ((1 << 7 * length) - 1)
        return (_UNKNOWN if size == (1 << 7 * length) - 1 else size), at + length
