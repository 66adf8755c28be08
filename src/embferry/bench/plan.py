"""Which contestants meet with which payloads, and how often."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .contestants import ALL, Contestant
from .harness import COPIES, Entry
from .payloads import IMAGE, SMALL, Payload

QUICK = (SMALL, IMAGE)
_MANY, _FEW = 2 << 20, 200 << 20
"""Up to the first size latencies are of interest and there are many rounds; beyond the second, few."""


class Plan(msgspec.Struct, frozen=True):
    payload: Payload
    rounds: int
    entries: tuple[Entry, ...]


def plan(payload: Payload, chosen: Sequence[Contestant] | None, rounds: int | None, *, quick: bool) -> Plan:
    """:param chosen: all of these; None: those that matter for this payload."""
    taking_part = chosen if chosen is not None else [c for c in ALL if _matters(c, payload, quick)]
    entries = tuple(Entry(contestant, payload, copies=_copies(contestant)) for contestant in taking_part)
    return Plan(payload, rounds or default_rounds(payload, quick=quick), entries)


def default_rounds(payload: Payload, *, quick: bool) -> int:
    if payload.size <= _MANY:
        return 15 if quick else 100
    if payload.size <= _FEW:
        return 3 if quick else 11
    return 2 if quick else 3


def _copies(contestant: Contestant) -> int:
    """How often the embedding lies in memory: source and destination, unless something comes in between."""
    direct = (
        contestant.options.get("in_place") or contestant.key in ("socket", "http-get") or contestant.kind == "engine"
    )
    return COPIES - 1 if direct else COPIES


def _matters(contestant: Contestant, payload: Payload, quick: bool) -> bool:
    """All variants of ours where the targets are (67 MB); fewer where they would only cost time."""
    if contestant.kind != "ours":
        return True
    mode, place = contestant.options["mode"], contestant.options["in_place"]
    if quick:
        return bool(mode == "verified" and place)
    if payload.size <= _MANY:
        return bool(place or mode == "verified")
    return payload.size <= _FEW or mode == "verified"
