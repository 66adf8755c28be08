"""The bytes of a connection. Integers are big-endian and unsigned.

====== ============================================== ======================================================
who    bytes                                          meaning
====== ============================================== ======================================================
sender ``EMBF`` version(1) kind=1(1) 0(2) token(16)   once, first: proves that the receiver's handle is known
sender ``EMBF`` version(1) kind=2(1) 0(2) epoch(8)    a write: the head, then ``ranges`` pairs of
       ticket(8) ranges(4) 0(4) payload(8)            offset(8) length(8), then ``payload`` bytes
back   ``EMBF`` version(1) kind=3(1) verdict(2)       the write is over; verdict 0: the bytes are in the
       ticket(8)                                      region, 1: refused
====== ============================================== ======================================================

Ranges are filled in order; ``payload`` is the sum of their lengths. Whoever breaks the format loses the connection.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..base.windows import Ranges

MAGIC, VERSION = b"EMBF", 1
TOKEN_BYTES = 16
MAX_RANGES = 1 << 16
MAX_PAYLOAD = 1 << 46  # bytes: more than any machine's memory, and times MAX_RANGES still below 64 bits
RANGE_BYTES = 16

_HELLO, _WRITE, _VERDICT = 1, 2, 3
HELLO = struct.Struct(f"!4sBBH{TOKEN_BYTES}s")
HEAD = struct.Struct("!4sBBHQQIIQ")
ANSWER = struct.Struct("!4sBBHQ")

WRITTEN, REFUSED = 0, 1

IOV_MAX = 1024  # buffers the kernel takes in one call (UIO_MAXIOV of linux/uio.h)
CALL_BYTES = 8 << 20  # so much in one call: enough to amortise it, little enough to give others a turn


class FrameError(ValueError):
    """The peer broke the format; the text says how."""


@dataclass(frozen=True, slots=True)
class Head:
    """A write, announced."""

    epoch: int
    ticket: int
    ranges: int
    payload: int


def hello(token: bytes) -> bytes:
    return HELLO.pack(MAGIC, VERSION, _HELLO, 0, token)


def parse_hello(data: bytes | bytearray) -> bytes:
    magic, version, kind, _, token = HELLO.unpack(data)
    _check(magic, version, kind, _HELLO)
    return bytes(token)


def head(epoch: int, ticket: int, ranges: Ranges) -> bytes:
    """Head and ranges of a write. Raises ``struct.error`` for an epoch or a ticket beyond 64 bits."""
    payload = int(ranges[:, 1].sum())
    start = HEAD.pack(MAGIC, VERSION, _WRITE, 0, epoch, ticket, len(ranges), 0, payload)
    return start + ranges.astype(">u8").tobytes()


def parse_head(data: bytes | bytearray) -> Head:
    """Checks every length before anybody allocates by it. A payload is never allocated: a refused one is discarded."""
    magic, version, kind, _, epoch, ticket, ranges, _, payload = HEAD.unpack(data)
    _check(magic, version, kind, _WRITE)
    if not 1 <= ranges <= MAX_RANGES:
        raise FrameError(f"a write of {ranges} ranges; 1 to {MAX_RANGES} are allowed")
    if payload > MAX_PAYLOAD:
        raise FrameError(f"a write of {payload} bytes; {MAX_PAYLOAD} are allowed")
    return Head(epoch, ticket, ranges, payload)


def parse_ranges(data: bytes | bytearray, payload: int) -> Ranges:
    ranges = np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 2)
    lengths = ranges[:, 1]
    # Each at most the payload, and at most MAX_RANGES of them: the sum cannot wrap.
    if (lengths > payload).any() or int(lengths.sum()) != payload:
        raise FrameError(f"the lengths of the ranges do not add up to the payload of {payload} bytes")
    return ranges


def answer(ticket: int, verdict: int) -> bytes:
    return ANSWER.pack(MAGIC, VERSION, _VERDICT, verdict, ticket)


def parse_answer(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """``(ticket, verdict)``."""
    magic, version, kind, verdict, ticket = ANSWER.unpack(data)
    _check(magic, version, kind, _VERDICT)
    if verdict not in (WRITTEN, REFUSED):
        raise FrameError(f"unknown verdict {verdict}")
    return ticket, verdict


def _check(magic: bytes, version: int, kind: int, expected: int) -> None:
    if magic != MAGIC:
        raise FrameError(f"magic bytes {magic!r}: this is not a peer of ours, or the stream lost its place")
    if version != VERSION:
        raise FrameError(f"version {version}; this end speaks {VERSION}")
    if kind != expected:
        raise FrameError(f"a frame of kind {kind} where {expected} belongs")


class Cursor:
    """A place in a list of buffers that a socket fills or drains in order, a part at a time."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = [view for view in views if view.nbytes]
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at == len(self._views)

    @property
    def left(self) -> int:
        return sum(view.nbytes for view in self._views[self._at :])

    def views(self) -> list[memoryview]:
        """The next buffers, as many as one call takes."""
        chosen, total = [], 0
        for view in itertools.islice(self._views, self._at, self._at + IOV_MAX):
            if total + view.nbytes > CALL_BYTES:
                chosen.append(view[: CALL_BYTES - total])
                break
            chosen.append(view)
            total += view.nbytes
        return chosen

    def advance(self, count: int) -> None:
        while count:
            view = self._views[self._at]
            if count < view.nbytes:
                self._views[self._at] = view[count:]
                return
            count -= view.nbytes
            self._at += 1

    def release(self) -> None:
        """Lets go of all buffers."""
        self._views, self._at = [], 0
