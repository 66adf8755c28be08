"""AVI files: their chunks must lie within the file, and their index within its chunk."""

from __future__ import annotations

import re
import struct

from embferry.serve.media.headers.claims import ClaimError

MAX_CHUNKS = 1_000_000
MAX_STREAMS = 64
MAX_DEPTH = 8
MAX_REPEATS = 4
"""How often the frames of an index may take the bytes of the file."""

_CODEC = re.compile(rb"strh.{4}vids(.{4})", re.DOTALL)


def check(data: bytes) -> None:
    """Checks the claims of an AVI file.

    Raises:
        ClaimError: they exceed the file, or the file has more streams than is read.
    """
    _Scan(data).chunks(0, len(data), 0)


def codec(data: bytes) -> str:
    """Returns the four characters that name the codec of the first video stream; empty if there is none."""
    found = _CODEC.search(data)
    return found[1].decode("latin-1").strip() if found else ""


def is_cut(data: bytes) -> bool:
    """Returns whether the list of frames reaches beyond the end of the file."""
    at = 12
    while at + 12 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at + 8 : at + 12] == b"movi":
            return at + 8 + size > len(data)
        at += 8 + size + size % 2
    return False


class _Scan:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.seen = self.streams = self.indexed = 0

    def chunks(self, at: int, end: int, depth: int) -> None:
        """Reads the chunks from ``at`` to ``end``. A chunk that reaches beyond ``end`` is read up to there."""
        if depth > MAX_DEPTH:
            raise ClaimError(f"its lists are nested more than {MAX_DEPTH} deep")
        while at + 8 <= end:
            self.seen += 1
            if self.seen > MAX_CHUNKS:
                raise ClaimError(f"it has more than {MAX_CHUNKS:,} chunks")
            name, size = self.data[at : at + 4], int.from_bytes(self.data[at + 4 : at + 8], "little")
            stop = min(at + 8 + size, end)
            if name in (b"RIFF", b"LIST"):
                if self.data[at + 8 : at + 12] != b"movi":  # the frames themselves claim nothing
                    self.chunks(at + 12, stop, depth + 1)
            elif name == b"strh":
                self.streams += 1
                if self.streams > MAX_STREAMS:
                    raise ClaimError(f"it has more than {MAX_STREAMS} streams")
            elif name == b"idx1":
                self.index(at + 8, stop)
            at += 8 + size + size % 2

    def index(self, at: int, end: int) -> None:
        entries = struct.iter_unpack("<12xI", memoryview(self.data)[at : end - (end - at) % 16])
        self.indexed += sum(size for (size,) in entries)
        if self.indexed > MAX_REPEATS * len(self.data):
            why = f"its index claims frames of {self.indexed:,} bytes, and the file has {len(self.data):,}"
            raise ClaimError(why, truncated=True)
