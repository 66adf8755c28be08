"""The unit of a write: contiguous bytes and the offset they go to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Contiguous bytes to write at ``offset`` of a peer's region.

    Attributes:
        source: The bytes, in the writer's memory.
        offset: Byte offset in the region of the receiver.
    """

    source: memoryview
    offset: int
