"""Embferry's own targets, as ratios within one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .results import TransferResults
from .summary import summarize

RATIOS = (
    ("shm/verified", "copy/private", 0.60),
    ("shm/ahead", "copy/private", 0.75),
    ("shm/unverified", "copy/private", 0.85),
    ("shm/verified", "direct/nixl", 1.5),
    ("shm/verified", "direct/mooncake", 3.0),
    ("tcp/verified", "socket", 0.85),
    ("tcp/unverified", "socket", 0.95),
    ("tcp/verified", "direct/mooncake", 1.2),
    ("tcp/verified", "zeromq/copied", 2.0),
    ("mooncake/verified", "direct/mooncake", 0.95),
    ("nixl/verified", "direct/nixl", 0.95),
)
"""Transport and mode, whose goodput its own is divided by (67 MB, in place), and the least ratio."""
SWEPT = (
    ("pool/{}/0.02", "pool/{}/1", 0.8, "goodput with 1/50 of the pool / with all of it"),
    ("concurrency/{}/256", "concurrency/{}/1", 0.9, "goodput of 256 at once / of one"),
)


class Reached(NamedTuple):
    what: str
    bound: float
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.bound


def reached(results: TransferResults) -> Iterator[Reached]:
    """Yields every target for which the run has the figures."""
    goodput = {
        (m.candidate, "" if m.sweep else m.payload.name): s.goodput
        for m in results.measurements
        if (s := summarize(m)) is not None
    }
    pairs = [
        ((f"{ours}/in-place", "67 MB"), (other, "67 MB"), bound, f"{ours}, 67 MB in place: goodput / {other}")
        for ours, other, bound in RATIOS
    ]
    for transport in ("shm", "tcp"):
        for one, other, bound, what in SWEPT:
            pairs.append(((one.format(transport), ""), (other.format(transport), ""), bound, f"{transport}: {what}"))
    for mine, theirs, bound, what in pairs:
        if mine in goodput and theirs in goodput:
            yield Reached(what, bound, goodput[mine] / goodput[theirs])
