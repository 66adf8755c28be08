"""One run: which candidates meet with which payloads and how often, then the sweeps."""

from __future__ import annotations

import tempfile

import msgspec

from ..results import Progress
from . import sweeps
from .candidates import ALL, Candidate
from .payloads import IMAGE, KNOWN, SMALL, Payload
from .results import TransferResults
from .rounds import Entry, measure

TIMEOUT_S = 60.0
_MANY, _FEW = 2 << 20, 200 << 20
"""Bytes. Payloads up to the first size get many rounds, because latency varies; those beyond the second get few."""


class Choice(msgspec.Struct, frozen=True):
    """Options of the user."""

    payloads: tuple[Payload, ...] = ()
    """Empty: the known ones."""
    only: tuple[Candidate, ...] = ()
    """Empty: those that matter for each payload."""
    rounds: int | None = None
    quick: bool = False
    sweeps: bool = True
    storage: str | None = None
    """The folder that stands for shared storage; a temporary one if None."""


class Batch(msgspec.Struct, frozen=True):
    """Entries that take turns."""

    rounds: int
    entries: tuple[Entry, ...]


def plan(choice: Choice) -> list[Batch]:
    batches = []
    for payload in choice.payloads or ((SMALL, IMAGE) if choice.quick else KNOWN):
        chosen = choice.only or [c for c in ALL if _matters(c, payload, choice.quick)]
        entries = tuple(Entry(candidate, payload, copies=_copies(candidate)) for candidate in chosen)
        batches.append(Batch(choice.rounds or _rounds(payload, choice.quick), entries))
    if choice.sweeps and not choice.quick and not choice.only:
        batches += [Batch(choice.rounds or sweeps.ROUNDS, tuple(points)) for points in sweeps.entries()]
    return batches


def total_rounds(batches: list[Batch]) -> int:
    """Returns the number of rounds of all entries, with those that warm up."""
    return sum(len(batch.entries) * (batch.rounds + 1) for batch in batches)


def run(choice: Choice, batches: list[Batch], results: TransferResults, progress: Progress) -> None:
    """Adds measurements to ``results``. Leaves no process, file or shared memory."""
    with results.recording(), tempfile.TemporaryDirectory(prefix="embferry-bench-", dir=choice.storage) as folder:
        for batch in batches:
            results.measurements += measure(batch.entries, batch.rounds, folder, TIMEOUT_S, progress)


def _rounds(payload: Payload, quick: bool) -> int:
    if payload.size <= _MANY:
        return 15 if quick else 100
    if payload.size <= _FEW:
        return 3 if quick else 11
    return 2 if quick else 3


def _copies(candidate: Candidate) -> int:
    direct = candidate.options.get("in_place") or candidate.key in ("socket", "http-get") or candidate.kind == "engine"
    return 2 if direct else 3


def _matters(candidate: Candidate, payload: Payload, quick: bool) -> bool:
    """Leaves out variants of embferry that would only cost time."""
    if candidate.kind != "ours":
        return True
    verified, in_place = candidate.options["mode"] == "verified", candidate.options["in_place"]
    if quick:
        return bool(verified and in_place)
    if payload.size <= _MANY:
        return bool(verified or in_place)
    return bool(verified or payload.size <= _FEW)
