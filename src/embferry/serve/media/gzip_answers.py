"""Unpacks answers of media hosts that are packed with gzip (RFC 1952), in pieces of limited size."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from embferry.serve.errors import ServeError

PIECE = 1 << 16
"""Bytes that are unpacked at a time."""
MAX_MEMBERS = 10_000
"""Members of one answer. Writers that pack in parallel make one for each 64 KiB or more."""
_START = b"\x1f\x8b"


class Unpacker:
    """Unpacks one answer: all of its members, up to bytes that are no member, which are passed over."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._members = 1
        self._before = b""  # of a further member, less than two bytes
        self._is_begun = self._is_over = False

    def unpack(self, packed: bytes) -> Iterator[bytes]:
        """Yields the bytes in a piece of the answer.

        Raises:
            ServeError: fetch_failed.
        """
        packed, self._before = self._before + packed, b""
        while packed and not self._is_over:
            if self._member.eof:
                packed = packed.lstrip(b"\0")  # padding
                if len(packed) < len(_START):
                    self._before = packed
                    return
                self._begin(packed)
                continue
            self._is_begun = True
            try:
                piece = self._member.decompress(packed, PIECE)
            except zlib.error as error:
                raise ServeError("fetch_failed", f"the host's answer is no gzip: {error}") from error
            yield piece
            packed = self._member.unused_data if self._member.eof else self._member.unconsumed_tail

    def _begin(self, packed: bytes) -> None:
        if not packed.startswith(_START):
            self._is_over = True
            return
        if self._members == MAX_MEMBERS:
            raise ServeError("fetch_failed", f"the host's answer has more than {MAX_MEMBERS:,} members of gzip")
        self._members += 1
        self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def finish(self) -> None:
        """Checks that the answer has ended with a whole member.

        Raises:
            ServeError: fetch_failed.
        """
        if self._is_begun and not self._member.eof:
            raise ServeError("fetch_failed", "the host's answer ends within its gzip; it is cut off")
