"""Cuts an embedding into chunks. A chunk is written, verified and, if need be, requested again as one."""

from __future__ import annotations

from . import guards
from .destination import TakenGrant
from .layout import Geometry, Layout

CHUNKS_OF_A_POOL = 4
"""A chunk is at most 1/4 of the receiver's pool, so that writing, verifying and granting overlap."""


def chunk_tokens(layout: Layout, chunk_bytes: int) -> int:
    """Returns the tokens of a chunk of about ``chunk_bytes``: a power of two, so that most block sizes divide it.

    Chunks end at multiples of this number where they can. The sender therefore knows the chunks in advance and can
    take their checksums before they are requested.
    """
    return 1 << max(0, (chunk_bytes // layout.token_bytes).bit_length() - 1)


def next_chunk(
    taken: TakenGrant, end: int, ready_tokens: int, geometry: Geometry, chunk_bytes: int
) -> tuple[int, int] | None:
    """Returns the next tokens of a grant to write, as (start, stop): whole blocks of the grant. None: nothing is ready.

    Args:
        taken: The grant; writing goes on at its cursor.
        end: Where the grant or the embedding ends, whichever comes first.
        ready_tokens: Tokens ``[0, ready_tokens)`` can be read.
        geometry: Of the receiver's region.
        chunk_bytes: The size to aim at.
    """
    start, first, size = taken.cursor, taken.start, geometry.block_size
    if start >= end:
        return None
    most = min(chunk_tokens(geometry.layout, chunk_bytes), geometry.num_blocks * size // CHUNKS_OF_A_POOL)
    length = max(1, most // size) * size
    stop = (start // length + 1) * length
    if (stop - first) % size:  # the grant does not begin on a block boundary of the embedding
        stop = start + length
    stop = min(end, stop)
    if not guards.is_ready(stop, ready_tokens):
        stop = first + (ready_tokens - first) // size * size
    return (start, stop) if stop > start else None
