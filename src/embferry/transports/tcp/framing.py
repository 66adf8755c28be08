"""The frames of a connection, after its greeting. Integers are big-endian and unsigned.

======== ============================================== ====================================================
from     bytes                                          meaning
======== ============================================== ====================================================
sender   ``EMBF`` version(1) kind=1(1) 0(2) token(16)   once, first: proves that the sender has the handle
sender   ``EMBF`` version(1) kind=2(1) 0(2) epoch(8)    a write: the head, then ``ranges`` pairs of
         ticket(8) ranges(4) 0(4) payload(8)            offset(8) length(8), then ``payload`` bytes
receiver ``EMBF`` version(1) kind=3(1) verdict(2)       the write has ended; verdict 0: the bytes are in the
         ticket(8)                                      region, 1: refused
receiver ``EMBF`` version(1) kind=4(1) 0(2) bytes(8)    a payload is coming in, and that many bytes of payloads have
                                                        come in on this connection so far
======== ============================================== ====================================================

Progress (kind 4) is reported once a second at most, and only within a payload. Without it, a sender could not tell a
slow link from one that swallows everything: the kernel, or a relay, takes megabytes that never arrive.

Ranges are filled in order; ``payload`` is the sum of their lengths. A frame that violates the format ends the
connection.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..handles import TOKEN_BYTES
from ..windows import MAX_PAYLOAD, MAX_RANGES, Ranges

MAGIC, VERSION = b"EMBF", 3

_HELLO, _WRITE, _VERDICT, _PROGRESS = 1, 2, 3, 4
HELLO = struct.Struct(f"!4sBBH{TOKEN_BYTES}s")
HEAD = struct.Struct("!4sBBHQQIIQ")
VERDICT = struct.Struct("!4sBBHQ")

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


def hello(token: bytes) -> bytes:
    return HELLO.pack(MAGIC, VERSION, _HELLO, 0, token)


def parse_hello(data: bytes | bytearray) -> bytes:
    magic, version, kind, _, token = HELLO.unpack(data)
    _check(magic, version, kind, _HELLO)
    return bytes(token)


def head(epoch: int, ticket: int, ranges: Ranges) -> bytes:
    """Encodes head and ranges of a write."""
    payload = int(ranges[:, 1].sum())
    start = HEAD.pack(MAGIC, VERSION, _WRITE, 0, epoch, ticket, len(ranges), 0, payload)
    return start + ranges.astype(">u8").tobytes()


def parse_head(data: bytes | bytearray) -> Head:
    """Decodes the head of a write; raises FrameError, before anything is allocated, if a length is excessive."""
    magic, version, kind, _, epoch, ticket, ranges, _, payload = HEAD.unpack(data)
    _check(magic, version, kind, _WRITE)
    if not 1 <= ranges <= MAX_RANGES:
        raise FrameError(f"a write of {ranges} ranges; 1 to {MAX_RANGES} are allowed")
    if payload > MAX_PAYLOAD:
        raise FrameError(f"a write of {payload} bytes; {MAX_PAYLOAD} are allowed")
    return Head(epoch, ticket, ranges, payload)


def verdict_frame(ticket: int, verdict: int) -> bytes:
    return VERDICT.pack(MAGIC, VERSION, _VERDICT, verdict, ticket)


def progress_frame(received: int) -> bytes:
    return VERDICT.pack(MAGIC, VERSION, _PROGRESS, 0, received)


def parse_verdict(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Returns ticket and verdict; for a report on progress, the bytes received and :data:`RECEIVING`."""
    magic, version, kind, verdict, ticket = VERDICT.unpack(data)
    if magic == MAGIC and version == VERSION and kind == _PROGRESS:
        return ticket, RECEIVING
    _check(magic, version, kind, _VERDICT)
    if verdict not in (WRITTEN, REFUSED):
        raise FrameError(f"unknown verdict {verdict}")
    return ticket, verdict


def _check(magic: bytes, version: int, kind: int, expected: int) -> None:
    if magic != MAGIC:
        raise FrameError(f"magic bytes {magic!r}: another program is connected, or the stream is out of step")
    if version != VERSION:
        raise FrameError(f"version {version}; this end supports {VERSION}")
    if kind != expected:
        raise FrameError(f"a frame of kind {kind} where {expected} is expected")
