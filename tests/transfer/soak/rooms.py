"""The rooms of a soak: size, content, and what happens in each. Both ends draw the same from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np

from embferry import Field, Fields, Geometry, Layout

LAYOUT = Layout(
    (Field("input_embeddings", "bfloat16", 1016), Field("fill_ids", "int32", 1), Field("mrope_positions", "int32", 3))
)
GEOMETRY = Geometry(LAYOUT, num_blocks=16, block_size=16)
"""A pool of 256 tokens in blocks of 32 KiB: a leak of one block a transfer is not to be overlooked."""
MAX_TOKENS = 5 * GEOMETRY.num_blocks * GEOMETRY.block_size
CONTENT_TOKENS = 1 << 12

Planned = Literal["delivered", "sender aborts", "receiver aborts", "refused"]
SHARES: dict[Planned, float] = {"delivered": 0.85, "sender aborts": 0.05, "receiver aborts": 0.05, "refused": 0.05}


@dataclass(frozen=True)
class Room:
    """One room.

    Attributes:
        number: Of the room; also of the transfer.
        tokens: Of its embedding: 1 to several times the pool, small ones as often as large ones.
        start: Where the embedding begins in the content that all rooms share.
        pieces: Tokens that are ready after each step of the producer.
        planned: How it is to end. ``refused``: the receiver has no room for so many tokens.
        at: Tokens after which an end aborts.
        takes: How the receiver takes the embedding.
        allocates: Whether the receiver allocates the first blocks itself, if the pool has enough.
    """

    number: int
    tokens: int
    start: int
    pieces: tuple[int, ...]
    planned: Planned
    at: int
    takes: Literal["gathered", "in place", "chunks"]
    allocates: bool

    @classmethod
    def drawn(cls, seed: int, number: int) -> Room:
        draw = random.Random(f"{seed} {number}")
        tokens = round(MAX_TOKENS ** draw.random() ** 4)
        steps = draw.choice((1, 1, 2, 5))
        return cls(
            number=number,
            tokens=tokens,
            start=draw.randrange(CONTENT_TOKENS - MAX_TOKENS),
            pieces=(*sorted(draw.randrange(tokens) for _ in range(steps - 1)), tokens),
            planned=draw.choices(list(SHARES), list(SHARES.values()))[0],
            at=draw.randrange(tokens),
            takes=draw.choice(("gathered", "in place", "chunks")),
            allocates=draw.random() < 0.1,
        )

    def content(self, all_rooms: Fields) -> Fields:
        return {name: rows[self.start : self.start + self.tokens] for name, rows in all_rooms.items()}


def all_content() -> Fields:
    """Returns random bytes, of which each room has a part."""
    rng = np.random.default_rng(0)
    return {f.name: rng.integers(0, 256, (CONTENT_TOKENS, f.token_bytes), np.uint8) for f in LAYOUT.fields}
