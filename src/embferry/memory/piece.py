"""The unit of a write: contiguous bytes and the offset they go to."""

from __future__ import annotations

from msgspec import Struct


class Piece(Struct, frozen=True):
    """Contiguous bytes to write at ``offset`` of a peer's region.

    Attributes:
        source: The bytes, in the writer's memory.
        offset: Byte offset in the region of the receiver.
    """

    source: memoryview
    offset: int
