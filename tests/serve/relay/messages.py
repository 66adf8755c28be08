"""Where a message of a hop ends, so that a relay can lose, repeat and swap whole ones."""

from __future__ import annotations

import re
from collections.abc import Iterator

from embferry.transfer.control.framing import HEADER

LONGEST = 1 << 24
"""Bytes of a control frame; what claims to be longer is none, such as a greeting, and passes as it comes."""
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class ControlFrames:
    """The frames of a control connection."""

    def __init__(self) -> None:
        self._held = b""

    def __call__(self, data: bytes) -> Iterator[bytes]:
        self._held += data
        while len(self._held) >= HEADER.size:
            size = HEADER.size + HEADER.unpack_from(self._held)[0]
            if size > LONGEST:
                size = len(self._held)
            if len(self._held) < size:
                return
            message, self._held = self._held[:size], self._held[size:]
            yield message


class HttpRequests:
    """The requests of an HTTP connection; their bodies have a length."""

    def __init__(self) -> None:
        self._held = b""

    def __call__(self, data: bytes) -> Iterator[bytes]:
        self._held += data
        while (end := self._held.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(self._held, 0, end)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._held) < size:
                return
            message, self._held = self._held[:size], self._held[size:]
            yield message
