"""Where a sender cuts an embedding: a chunk is written, verified and, if need be, asked for again as one."""

from __future__ import annotations

from . import guards
from .layout import Geometry, Layout
from .validation import TakenGrant

CHUNKS_OF_A_POOL = 4
"""Chunks are at most one part in so many of the receiver's pool, so that writing, checking and granting overlap."""


def chunk_tokens(layout: Layout, chunk_bytes: int) -> int:
    """Tokens of a chunk of about ``chunk_bytes``: a power of two, so that most block sizes divide it.

    Chunks end at multiples of it where they can: so what they are can be known, and checksummed, before they are asked
    for."""
    return 1 << max(0, (chunk_bytes // layout.token_bytes).bit_length() - 1)


def next_chunk(
    taken: TakenGrant, end: int, ready_tokens: int, geometry: Geometry, chunk_bytes: int
) -> tuple[int, int] | None:
    """The tokens, as (start, stop), that can be written next of a grant that goes on to ``end``: whole blocks of it."""
    start, first, size = taken.cursor, taken.message.sent_tokens, geometry.block_size
    if start >= end:
        return None
    most = min(chunk_tokens(geometry.layout, chunk_bytes), geometry.num_blocks * size // CHUNKS_OF_A_POOL)
    length = max(1, most // size) * size
    stop = (start // length + 1) * length
    if (stop - first) % size:  # the grant began within a block of the embedding
        stop = start + length
    stop = min(end, stop)
    if not guards.is_ready(stop, ready_tokens):
        stop = first + (ready_tokens - first) // size * size
    return (start, stop) if stop > start else None
