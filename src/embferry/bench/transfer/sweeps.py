"""Sweeps: one setting of embferry is varied, over the transports that need no engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from .candidates import Candidate
from .payloads import IMAGE, SMALL, VIDEO, Payload
from .rounds import Entry

TRANSPORTS = ("shm", "tcp")
ROUNDS = 5
POOLS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
COUNTS = (1, 4, 16, 64, 256)
EQUAL = Payload("8.4 MB", 256, "one of many at once")
EQUAL_POOL = 4096
"""Tokens, 134 MB: 64 and 256 such embeddings do not fit."""
BEHIND = 40
"""Small embeddings behind a large one."""


class Sweep(msgspec.Struct, frozen=True):
    name: str
    title: str
    note: str
    axis: str = ""
    """The varied setting, for a line chart; empty for bars."""


SWEEPS = (
    Sweep(
        "pool",
        "Size of the pool",
        "From 1/50 of the embedding to twice its size. What does not fit is sent by resumed transfers.",
        "pool / embedding",
    ),
    Sweep(
        "concurrency",
        "Transfers at once",
        "Embeddings of 8.4 MB share a pool of 134 MB. Fairness is Jain's index of their goodputs.",
        "transfers at once",
    ),
    Sweep(
        "blocking",
        "Small embeddings behind a large one",
        f"{BEHIND} of 1 MiB at once, alone and behind one of 403 MB; all share a pool of 134 MB.",
    ),
    Sweep("early", "Early announcement", "The sender announces before the encoder runs, or only with the embedding."),
)


def entries(large: Payload = VIDEO) -> Iterator[list[Entry]]:
    """Yields the points of each sweep; those of one list take turns."""
    block = max(1, large.tokens // 400)
    for transport in TRANSPORTS:
        yield [
            _point(
                *("pool", transport, large, share, f"pool {share:g}", 2 + share),
                pool_tokens=max(1, round(large.tokens * share)),
                block_tokens=block,
            )
            for share in POOLS
        ]
        yield [
            _point(
                *("concurrency", transport, EQUAL, n, f"{n} at once", 2 + n + EQUAL_POOL / EQUAL.tokens),
                rooms=[EQUAL.tokens] * n,
                pool_tokens=EQUAL_POOL,
                block_tokens=8,
            )
            for n in COUNTS
        ]
        small, pool = [SMALL.tokens] * BEHIND, max(1, large.tokens // 3)
        yield [
            _point("blocking", transport, large, 0, "small ones alone", 3, rooms=small, pool_tokens=pool),
            _point(
                "blocking", transport, large, 1, "behind a large one", 3, rooms=[large.tokens, *small], pool_tokens=pool
            ),
        ]
        for payload in (SMALL, IMAGE):
            yield [
                _point("early", transport, payload, 0, "announced early", 2, early=True, in_place=True),
                _point("early", transport, payload, 1, "announced when ready", 2, early=False, in_place=True),
            ]


def _point(sweep: str, transport: str, payload: Payload, x: float, words: str, copies: float, **options: Any) -> Entry:
    full = {"transport": transport, "mode": "verified", "in_place": False} | options
    key = f"{sweep}/{transport}/{x:g}"
    candidate = Candidate(key, f"{transport}, {words}", "ours", f"{__package__}.library:Embferry", full)
    return Entry(candidate, payload, sweep, x, copies)
