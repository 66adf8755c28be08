"""Frames on a connection: ``length(4) inverted(4) check(4) payload``, integers big-endian.

``inverted`` is the length with every bit inverted. With a damaged length, an end would wait for bytes that never come,
and take all later frames for them. ``check`` is the low half of the xxh3-64 of the payload. TCP's own checksum of 16
bits misses errors that a router or a network card makes, and a message with a flipped bit can be a valid message that
says something else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import xxhash

from embferry.protocol.errors import RemoteProtocolError

HEADER = struct.Struct("!III")
ALL_BITS = 0xFFFFFFFF


def check(payload: bytes) -> int:
    """Returns the check of a payload."""
    return xxhash.xxh3_64_intdigest(payload) & ALL_BITS


def header(length: int, check: int) -> bytes:
    """Returns the header of a frame."""
    return HEADER.pack(length, length ^ ALL_BITS, check)


def frame(payload: bytes) -> bytes:
    """Returns ``payload`` as it travels."""
    return header(len(payload), check(payload)) + payload


class FrameReader:
    """Cuts a stream of bytes into frames.

    Args:
        limit: Longest payload; may be changed between frames.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = bytearray()

    @property
    def held(self) -> int:
        """Bytes of a frame that has begun."""
        return len(self._held)

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Yields the payloads that ``received`` completes. Must be exhausted before the next call.

        Raises:
            RemoteProtocolError: A frame is too long, empty or damaged; nothing after it can be trusted.
        """
        if self._held:
            self._held += received
        data = self._held or received
        at, end = 0, len(data)
        while end - at >= HEADER.size:
            length, inverted, expected = HEADER.unpack_from(data, at)
            if length != inverted ^ ALL_BITS:
                self._held = bytearray()
                raise RemoteProtocolError("the length of a control frame was damaged on its way")
            if not 1 <= length <= self.limit:
                self._held = bytearray()
                raise RemoteProtocolError(f"a control frame of {length} bytes; 1 to {self.limit} are allowed")
            stop = at + HEADER.size + length
            if stop > end:
                break
            payload = bytes(data[at + HEADER.size : stop])
            if check(payload) != expected:
                self._held = bytearray()
                raise RemoteProtocolError("a control frame was damaged on its way")
            at = stop
            yield payload
        if data is received or at:  # otherwise nothing was taken off
            self._held = bytearray(data[at:]) if at < end else bytearray()
