"""Checksums of chunks taken before they are requested: while the encoder runs, or once for many transfers."""

from __future__ import annotations

from collections.abc import Generator

import xxhash

from embferry.memory.buffers import PASS_BYTES
from embferry.protocol.chunks import chunk_tokens
from embferry.protocol.layout import Layout
from embferry.protocol.settings import DEFAULTS

from .fields import Fields


def checksum_steps(layout: Layout, rows: Fields, offset: int, length: int) -> Generator[None, None, bytes]:
    """Takes the xxh3-64, big-endian, of tokens ``[offset, offset + length)``: field by field, tokens ascending.

    A generator that yields after every :data:`~embferry.memory.buffers.PASS_BYTES` at most and returns the checksum.
    """
    digest = xxhash.xxh3_64()
    for field in layout.fields:
        data = rows[field.name][offset : offset + length].reshape(-1).data
        for step in range(0, len(data), PASS_BYTES):
            digest.update(data[step : step + PASS_BYTES])
            yield
    return digest.digest()


def chunk_checksum(layout: Layout, rows: Fields, offset: int, length: int) -> bytes:
    """Returns the result of :func:`checksum_steps`, taken at once."""
    steps = checksum_steps(layout, rows, offset, length)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return bytes(end.value)


class Checksums:
    """Checksums of the chunks of one embedding.

    A transfer whose chunks have other boundaries takes its own checksums while it writes.

    Args:
        layout: The fields of a token.
        chunk_bytes: As in the settings of the manager that will send.
    """

    def __init__(self, layout: Layout, chunk_bytes: int = DEFAULTS.chunk_bytes) -> None:
        self._layout = layout
        self._chunk_tokens = chunk_tokens(layout, chunk_bytes)
        self._known: dict[tuple[int, int], bytes] = {}
        self._at = 0

    def take(self, rows: Fields, ready_tokens: int) -> None:
        """Takes the checksums of all chunks below ``ready_tokens``. Call it again as more tokens become ready.

        Any thread, one at a time.
        """
        total = len(rows[self._layout.fields[0].name])
        while self._at < ready_tokens:
            stop = min(self._at + self._chunk_tokens, total)
            if stop > ready_tokens:
                return
            self._known[self._at, stop - self._at] = chunk_checksum(self._layout, rows, self._at, stop - self._at)
            self._at = stop

    def of(self, offset: int, length: int) -> bytes | None:
        """Returns the checksum of a chunk, or None if it has not been taken."""
        return self._known.get((offset, length))
