"""Our own targets: ratios within one run, and costs of one transfer. Several runs make one table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..report import Row, Table
from .payloads import IMAGE, SMALL
from .results import Measurement, TransferResults
from .sweeps import ROOMS, TRANSPORTS

TITLE = "Our own targets"
MET = {True: ("yes", "good"), False: ("no", "bad")}
SMALL_BOUNDS = {"shm": 1.0, "tcp": 1.5}
GOODPUTS = (
    ("shm/verified/in-place", "copy/private", 0.62),
    ("shm/ahead/in-place", "copy/private", 0.75),
    ("shm/unverified/in-place", "copy/private", 0.85),
    ("shm/verified/gathered", "copy/private", 0.50),
    ("tcp/verified/in-place", "socket", 0.85),
    ("tcp/unverified/in-place", "socket", 0.95),
    ("nixl/verified/in-place", "direct/nixl", 0.8),
    ("nixl/unverified/in-place", "direct/nixl", 0.8),
)
"""A candidate, the one whose goodput its own is divided by (67 MB), and the least ratio."""
CPU_MS = 0.4
BEFORE, TIMES_BEFORE = {"shm": 2700.0, "tcp": 2000.0}, 4
"""64 KiB transfers a second, 64 at once, on the machine of ``docs/benchmarks.md`` with ZeroMQ as the control plane, and
how many times as many there should be."""
RESUMED = ((20, 1.05), (100, 1.15))
"""A number of transfers, and how many times as long as one transfer they may take."""
SMALL_POOL, SMALL_POOL_BOUND = "0.02", 0.80
BEHIND_BOUND = 5.0
ROOMS_BOUND = 1.1
AT_ONCE, AT_ONCE_BOUND, FAIR = 256, 0.95, 0.99


class Reached(NamedTuple):
    what: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def bound(self) -> str:
        return f"≤ {self.most:,g}" if self.most is not None else f"≥ {self.least:,g}"

    @property
    def met(self) -> bool:
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)


class _Run:
    """Measurements of one run by the key of the candidate or of the point of a sweep."""

    def __init__(self, results: TransferResults) -> None:
        measured = [m for m in results.measurements if m.measured]
        self.points = {m.candidate: m for m in measured if m.sweep}
        self._compared = {(m.candidate, m.payload.name): m for m in measured if not m.sweep}

    def pair(self, one: str, other: str, payload: str = "") -> tuple[Measurement, Measurement] | None:
        """Returns two points of a sweep, or two candidates with a payload; None if one of them is missing."""
        keys = [(key, payload) for key in (one, other)]
        found = [self._compared.get(key) if payload else self.points.get(key[0]) for key in keys]
        return (found[0], found[1]) if found[0] is not None and found[1] is not None else None

    def resumed(self, transport: str, transfers: int) -> Measurement | None:
        """Returns the point whose small pool has forced the number of transfers that is nearest to this one."""
        counted = {_transfers(m): m for key, m in self.points.items() if key.startswith(f"pool/{transport}/")}
        several = [n for n in counted if n > 1]
        nearest = min(several, key=lambda n: max(n / transfers, transfers / n), default=0)
        return counted.get(nearest)


def reached(results: TransferResults) -> Iterator[Reached]:
    """Yields every target for which the run has the figures."""
    run = _Run(results)
    for transport, most in SMALL_BOUNDS.items():
        if pair := run.pair(f"{transport}/verified/in-place", "socket", SMALL.name):
            what = f"{transport}, {SMALL.name} verified: p50 / a raw socket's"
            yield Reached(what, pair[0].seconds(0.5) / pair[1].seconds(0.5), most=most)
    for transport in TRANSPORTS:
        if (m := run.points.get(f"small/{transport}/1")) is not None:
            yield Reached(f"{transport}, 1 token: CPU ms of the sender", _sender_ms(m), most=CPU_MS)
            yield Reached(f"{transport}, 1 token: CPU ms of the receiver", _receiver_ms(m), most=CPU_MS)
        if (m := run.points.get(f"small/{transport}/64")) is not None:
            what = f"{transport}, 64 KiB, 64 at once: transfers a second"
            yield Reached(what, m.count / m.seconds(0.5), TIMES_BEFORE * BEFORE[transport])
    for transport in TRANSPORTS:
        yield from _pools(run, transport)
    for transport in TRANSPORTS:
        if pair := run.pair(f"behind/{transport}/1", f"behind/{transport}/0"):
            what = f"{transport}, {SMALL.name} behind 403 MB: p99 / alone"
            yield Reached(what, pair[0].wait(0.99) / pair[1].wait(0.99), most=BEHIND_BOUND)
    for one, other, least in GOODPUTS:
        if pair := run.pair(one, other, IMAGE.name):
            yield Reached(f"{one}, {IMAGE.name}: goodput / {other}", pair[0].goodput[0] / pair[1].goodput[0], least)
    few, many = ROOMS
    if pair := run.pair(f"rooms/{TRANSPORTS[0]}/{many}", f"rooms/{TRANSPORTS[0]}/{few}"):
        words = f"1 token, {many:,} rooms open / {few}: CPU of the"
        yield Reached(f"{words} sender", _sender_ms(pair[0]) / _sender_ms(pair[1]), most=ROOMS_BOUND)
        yield Reached(f"{words} receiver", _receiver_ms(pair[0]) / _receiver_ms(pair[1]), most=ROOMS_BOUND)
    for transport in TRANSPORTS:
        if pair := run.pair(f"concurrency/{transport}/{AT_ONCE}", f"concurrency/{transport}/1"):
            ratio, fairness = pair[0].goodput[0] / pair[1].goodput[0], pair[0].fairness
            yield Reached(f"{transport}, {AT_ONCE} at once: goodput / that of one", ratio, AT_ONCE_BOUND)
            if fairness is not None:
                yield Reached(f"{transport}, {AT_ONCE} at once: fairness (Jain)", fairness, FAIR)


def _pools(run: _Run, transport: str) -> Iterator[Reached]:
    if (whole := run.points.get(f"pool/{transport}/1")) is None:
        return
    for transfers, most in RESUMED:
        if (resumed := run.resumed(transport, transfers)) is not None:
            what = f"{transport}, 403 MB: time of about {transfers} transfers / of one"
            yield Reached(what, resumed.seconds(0.5) / whole.seconds(0.5), most=most)
    if (tight := run.points.get(f"pool/{transport}/{SMALL_POOL}")) is not None:
        what = f"{transport}, pool of 1/50 of 403 MB: goodput / with all of it"
        yield Reached(what, tight.goodput[0] / whole.goodput[0], SMALL_POOL_BOUND)


def table(runs: Sequence[TransferResults]) -> Table | None:
    """Returns the targets with what one run has reached, or the median, the least and the greatest of several."""
    found: dict[str, list[Reached]] = {}
    for run in runs:
        for target in reached(run):
            found.setdefault(target.what, []).append(target)
    several, rows = len(runs) > 1, []
    for what, each in found.items():
        values = [target.value for target in each]
        median = each[0]._replace(value=statistics.median(values))
        spread = (min(values), max(values)) if several else ()
        word, kind = MET[median.met]
        rows.append(Row((what, median.bound, *(_number(value) for value in (median.value, *spread)), word), kind))
    if not rows:
        return None
    if several:
        columns, note = ("what", "bound", "median", "least", "greatest", "met"), f"Of {len(runs)} runs."
        return Table(TITLE, columns, tuple(rows), note)
    return Table(TITLE, ("what", "bound", "reached", "met"), tuple(rows), folded=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _transfers(m: Measurement) -> int:
    return round(statistics.median(sample.transfers or 0 for sample in m.samples))


def _sender_ms(m: Measurement) -> float:
    return m.cpu_of_one(lambda sample: sample.sender_cpu) * 1e3


def _receiver_ms(m: Measurement) -> float:
    return m.cpu_of_one(lambda sample: sample.receiver_cpu) * 1e3
