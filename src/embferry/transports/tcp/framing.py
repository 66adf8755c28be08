"""The frames of a connection, after its greeting. Integers are big-endian and unsigned.

======== ============================================== ====================================================
from     bytes                                          meaning
======== ============================================== ====================================================
sender   ``EMBF`` version(1) kind=1(1) 0(2) token(16)   once, first: proves that the sender has the handle
sender   ``EMBF`` version(1) kind=2(1) 0(2) epoch(8)    a write: the head, then ``ranges`` pairs of
         ticket(8) ranges(4) check(4) payload(8)        offset(8) length(8), then ``payload`` bytes
receiver ``EMBF`` version(1) kind=3(1) verdict(2)       the write has ended; verdict 0: the bytes are in the
         ticket(8) check(4)                             region, 1: refused
receiver ``EMBF`` version(1) kind=4(1) 0(2) bytes(8)    a payload is coming in, and that many bytes of payloads have
         check(4)                                       come in on this connection so far
======== ============================================== ====================================================

Progress (kind 4) is reported once a second at most, and only within a payload. Without it, a sender could not tell a
slow link from one that swallows everything: the kernel, or a relay, takes megabytes that never arrive.

``check`` is the low half of the xxh3-64 of the rest of the frame, payload excepted: head and ranges. A payload has the
checksum of its chunk, but a damaged head would be answered as refused, and so end a transfer for good.

Ranges are filled in order; ``payload`` is the sum of their lengths. A frame that violates the format ends the
connection.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from ..handles import TOKEN_BYTES
from ..windows import MAX_PAYLOAD, MAX_RANGES, Ranges

MAGIC, VERSION = b"EMBF", 3

_HELLO, _WRITE, _VERDICT, _PROGRESS = 1, 2, 3, 4
HELLO = struct.Struct(f"!4sBBH{TOKEN_BYTES}s")
HEAD = struct.Struct("!4sBBHQQIIQ")
VERDICT = struct.Struct("!4sBBHQI")

WRITTEN, REFUSED, RECEIVING = 0, 1, 2


class FrameError(ValueError):
    """The peer violated the format; the text says how."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a write."""

    epoch: int
    ticket: int
    ranges: int
    payload: int
    check: int

    def verify(self, ranges: bytes | bytearray) -> None:
        """Raises FrameError unless head and ranges have arrived as they were sent."""
        if self.check != _check_of(self.epoch, self.ticket, self.ranges, self.payload, ranges):
            raise FrameError("a write whose head was damaged on its way")


def hello(token: bytes) -> bytes:
    return HELLO.pack(MAGIC, VERSION, _HELLO, 0, token)


def parse_hello(data: bytes | bytearray) -> bytes:
    magic, version, kind, _, token = HELLO.unpack(data)
    _check(magic, version, kind, _HELLO)
    return bytes(token)


def head(epoch: int, ticket: int, ranges: Ranges) -> bytes:
    """Encodes head and ranges of a write."""
    return write_head(epoch, ticket, len(ranges), int(ranges[:, 1].sum()), ranges.astype(">u8").tobytes())


def write_head(epoch: int, ticket: int, count: int, payload: int, ranges: bytes) -> bytes:
    """Encodes a head, whether it makes sense or not, and its encoded ranges, with their check."""
    check = _check_of(epoch, ticket, count, payload, ranges)
    return HEAD.pack(MAGIC, VERSION, _WRITE, 0, epoch, ticket, count, check, payload) + ranges


def parse_head(data: bytes | bytearray) -> Head:
    """Decodes the head of a write; raises FrameError, before anything is allocated, if a length is excessive."""
    magic, version, kind, _, epoch, ticket, ranges, check, payload = HEAD.unpack(data)
    _check(magic, version, kind, _WRITE)
    if not 1 <= ranges <= MAX_RANGES:
        raise FrameError(f"a write of {ranges} ranges; 1 to {MAX_RANGES} are allowed")
    if payload > MAX_PAYLOAD:
        raise FrameError(f"a write of {payload} bytes; {MAX_PAYLOAD} are allowed")
    return Head(epoch, ticket, ranges, payload, check)


def verdict_frame(ticket: int, verdict: int) -> bytes:
    return answer(_VERDICT, verdict, ticket)


def progress_frame(received: int) -> bytes:
    return answer(_PROGRESS, 0, received)


def answer(kind: int, verdict: int, number: int) -> bytes:
    """Encodes a frame of a receiver, whether it makes sense or not, with its check."""
    return VERDICT.pack(MAGIC, VERSION, kind, verdict, number, _check_answer(kind, verdict, number))


def parse_verdict(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Returns ticket and verdict; for a report on progress, the bytes received and :data:`RECEIVING`."""
    magic, version, kind, verdict, ticket, check = VERDICT.unpack(data)
    _check(magic, version, kind, _PROGRESS if kind == _PROGRESS else _VERDICT)
    if check != _check_answer(kind, verdict, ticket):
        raise FrameError("an answer that was damaged on its way")
    if kind == _PROGRESS:
        return ticket, RECEIVING
    if verdict not in (WRITTEN, REFUSED):
        raise FrameError(f"unknown verdict {verdict}")
    return ticket, verdict


def _check_of(epoch: int, ticket: int, count: int, payload: int, ranges: bytes | bytearray) -> int:
    start = HEAD.pack(MAGIC, VERSION, _WRITE, 0, epoch, ticket, count, 0, payload)
    return xxhash.xxh3_64_intdigest(start + ranges) & 0xFFFFFFFF


def _check_answer(kind: int, verdict: int, number: int) -> int:
    return xxhash.xxh3_64_intdigest(VERDICT.pack(MAGIC, VERSION, kind, verdict, number, 0)) & 0xFFFFFFFF


def _check(magic: bytes, version: int, kind: int, expected: int) -> None:
    if magic != MAGIC:
        raise FrameError(f"magic bytes {magic!r}: another program is connected, or the stream is out of step")
    if version != VERSION:
        raise FrameError(f"version {version}; this end supports {VERSION}")
    if kind != expected:
        raise FrameError(f"a frame of kind {kind} where {expected} is expected")
