"""Which candidates meet with which payloads and how often; then the sweeps.

A sweep varies one setting of embferry, over the transports that need no engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..results import Progress
from .candidates import ALL, OURS, Candidate
from .payloads import IMAGE, KNOWN, SMALL, VIDEO, Payload
from .results import TransferResults
from .rounds import Entry, measure

MANY, FEW = 2 << 20, 200 << 20
"""Bytes. Payloads up to the first size get many rounds, because latency varies; those beyond the second get few."""
SWEPT_ROUNDS = 5
SWEPT_TRANSPORTS = ("shm", "tcp")
POOLS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
COUNTS = (1, 4, 16, 64, 256)
EQUAL = Payload("8.4 MB", 256, "one of many at once")
EQUAL_POOL = 4096
"""Tokens, 134 MB: 64 and 256 such embeddings do not fit."""
BEHIND = 40
"""Small embeddings behind a large one."""


class Batch(NamedTuple):
    """Entries that take turns."""

    rounds: int
    entries: list[Entry]


def plan(
    payloads: Sequence[Payload] = (),
    only: Sequence[Candidate] = (),
    rounds: int | None = None,
    quick: bool = False,
    sweeps: bool = True,
) -> list[Batch]:
    """Returns what is measured: by default the known payloads, with the candidates that matter, and the sweeps."""
    batches = []
    for payload in payloads or ((SMALL, IMAGE) if quick else KNOWN):
        size = 0 if payload.size <= MANY else 1 if payload.size <= FEW else 2
        entries = [
            Entry(candidate, payload, copies=_copies(candidate))
            for candidate in only or [c for c in ALL if _matters(c, size, quick)]
        ]
        batches.append(Batch(rounds or ((15, 3, 2) if quick else (100, 11, 3))[size], entries))
    if sweeps and not quick and not only:
        batches += [Batch(rounds or SWEPT_ROUNDS, points) for points in swept()]
    return batches


def total_rounds(batches: list[Batch]) -> int:
    """Returns the number of rounds of all entries, with those that warm up."""
    return sum(len(batch.entries) * (batch.rounds + 1) for batch in batches)


def run(batches: list[Batch], storage: Path | None, results: TransferResults, progress: Progress) -> None:
    """Adds measurements to ``results``; ``storage`` stands for shared storage. Leaves no process and no file."""
    with tempfile.TemporaryDirectory(prefix="embferry-bench-", dir=storage) as folder:
        for batch in batches:
            results.measurements += measure(batch.entries, batch.rounds, folder, progress)


def _copies(candidate: Candidate) -> int:
    direct = candidate.options.get("in_place") or candidate.key in ("socket", "http-get") or candidate.kind == "engine"
    return 2 if direct else 3


def _matters(candidate: Candidate, size: int, quick: bool) -> bool:
    """Leaves out variants of embferry that would only cost time, for a small (0), middle (1) or large (2) payload."""
    if candidate.kind != "ours":
        return True
    verified, in_place = candidate.options["mode"] == "verified", candidate.options["in_place"]
    if quick:
        return bool(verified and in_place)
    return bool(verified or size == 1 or (size == 0 and in_place))


def swept(large: Payload = VIDEO) -> Iterator[list[Entry]]:
    """Yields the points of each sweep; those of one list take turns."""
    for transport in SWEPT_TRANSPORTS:
        block = max(1, large.tokens // 400)
        points, setting = [], dict[str, Any]()
        for share in POOLS:
            setting = {"pool_tokens": max(1, round(large.tokens * share)), "block_tokens": block}
            points.append(_point("pool", transport, large, share, f"pool {share:g}", 2 + share, **setting))
        yield points
        points = []
        for n in COUNTS:
            setting = {"rooms": [EQUAL.tokens] * n, "pool_tokens": EQUAL_POOL, "block_tokens": 8}
            copies = 2 + n + EQUAL_POOL / EQUAL.tokens
            points.append(_point("concurrency", transport, EQUAL, n, f"{n} at once", copies, **setting))
        yield points
        small, pool = [SMALL.tokens] * BEHIND, max(1, large.tokens // 3)
        yield [
            _point("blocking", transport, large, x, words, 3, rooms=rooms, pool_tokens=pool)
            for x, words, rooms in ((0, "small ones alone", small), (1, "behind a large one", [large.tokens, *small]))
        ]
        for payload in (SMALL, IMAGE):
            yield [
                _point("early", transport, payload, x, f"announced {when}", 2, early=not x, in_place=True)
                for x, when in ((0, "early"), (1, "when ready"))
            ]


def _point(sweep: str, transport: str, payload: Payload, x: float, words: str, copies: float, **options: Any) -> Entry:
    full = {"transport": transport, "mode": "verified", "in_place": False} | options
    candidate = Candidate(f"{sweep}/{transport}/{x:g}", f"{transport}, {words}", "ours", OURS, full)
    return Entry(candidate, payload, sweep, copies)
