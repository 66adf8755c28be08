"""The plan of a run: the payloads and rounds of each candidate, then the sweeps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..results import Progress
from .candidates import ALL, Candidate, matches
from .payloads import IMAGE, KNOWN, SMALL, Payload
from .results import TransferResults
from .rounds import Entry, measure
from .sweeps import sweeps as all_sweeps

MANY, FEW = 2 << 20, 200 << 20
"""Bytes. Payloads up to the first size get many rounds, because latency varies; those beyond the second get few."""
SWEPT_ROUNDS = 5
QUICK_SWEPT_ROUNDS = 3


class Batch(NamedTuple):
    """Entries that take turns."""

    rounds: int
    entries: list[Entry]


def plan(
    payloads: Sequence[Payload] = (),
    only: Sequence[str] = (),
    rounds: int | None = None,
    quick: bool = False,
    sweeps: bool = True,
) -> list[Batch]:
    """Returns what is measured: by default the known payloads, with the candidates that matter, and the sweeps.

    ``only``: patterns for keys of candidates and of points of sweeps (:func:`.candidates.matches`).

    Raises:
        ValueError: A pattern matches nothing.
    """
    points = list(all_sweeps(quick and not only))
    _check(only, points)

    def chosen(key: str) -> bool:
        return not only or any(matches(key, pattern) for pattern in only)

    batches = []
    for payload in payloads or ((SMALL, IMAGE) if quick else KNOWN):
        size = 0 if payload.size <= MANY else 1 if payload.size <= FEW else 2
        candidates = [c for c in ALL if chosen(c.key) and (only or _matters(c, size, quick))]
        entries = [Entry(candidate, payload, copies=_copies(candidate)) for candidate in candidates]
        batches.append(Batch(rounds or ((15, 3, 2) if quick else (100, 11, 3))[size], entries))
    for sweep in points if sweeps else []:
        entries = [entry for entry in sweep if chosen(entry.candidate.key)]
        batches.append(Batch(rounds or (QUICK_SWEPT_ROUNDS if quick else SWEPT_ROUNDS), entries))
    return [batch for batch in batches if batch.entries]


def _check(patterns: Sequence[str], points: list[list[Entry]]) -> None:
    swept = [entry for sweep in points for entry in sweep]
    keys = [c.key for c in ALL] + [entry.candidate.key for entry in swept]
    for pattern in patterns:
        if not any(matches(key, pattern) for key in keys):
            known = ", ".join([*(c.key for c in ALL), *dict.fromkeys(entry.result.sweep for entry in swept)])
            raise ValueError(f"no candidate is called {pattern!r}; choose from {known}")


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
