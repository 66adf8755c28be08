"""Where it has to be: ratios within one run, as data, and what a run reached."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from .contestants import BY_KEY
from .results import Measurement, Results
from .summary import Summary, behind, fairness, quantile, summarize

PLACES = ("in-place", "gathered")
CROSSING = ("engine", "peer")


class Ratio(msgspec.Struct, frozen=True):
    """Our goodput over that of the best of ``against``, with one payload."""

    ours: str
    """TransportAddress and mode; the variants are in :data:`PLACES`."""
    at_least: float
    against: tuple[str, ...]
    payload: str = "67 MB"


COPY, SOCKET, NIXL = ("copy/private",), ("socket",), ("direct/nixl",)
MOONCAKE = ("direct/mooncake", "direct/mooncake-tuned")
RATIOS = (
    Ratio("shm/verified", 0.60, COPY),
    Ratio("shm/ahead", 0.75, COPY),
    Ratio("shm/unverified", 0.85, COPY),
    Ratio("shm/verified", 1.5, NIXL),
    Ratio("shm/verified", 3.0, MOONCAKE),
    Ratio("tcp/verified", 0.85, SOCKET),
    Ratio("tcp/unverified", 0.95, SOCKET),
    Ratio("tcp/verified", 1.2, MOONCAKE),
    Ratio("tcp/verified", 2.0, ("zeromq/copied",)),
    Ratio("mooncake/verified", 0.95, MOONCAKE),
    Ratio("mooncake/unverified", 0.95, MOONCAKE),
    Ratio("nixl/verified", 0.95, NIXL),
    Ratio("nixl/unverified", 0.95, NIXL),
)
TIME_OF_TRANSFERS = {20: 1.05, 100: 1.15}
SMALL_POOL, OF_WHOLE_POOL = 0.02, 0.80
LATENCY_S = 1e-3
CROWD, OF_ONE, FAIR = 256, 0.90, 0.99
WAIT_OVER_P99 = 5.0
WIRE = 1.001
"""Bytes over payload; the smallest payload is left out, whose control messages weigh more."""
WIRE_FROM = 10 << 20


class Reached(msgspec.Struct, frozen=True):
    """A line of the table. ``values`` are by variant (``in place``, ``gathered``), or under ``""`` if there is one."""

    what: str
    bound: str
    values: dict[str, float]
    met: dict[str, bool]

    @property
    def verdict(self) -> str:
        """``yes`` and ``no`` for all variants that were measured, else which of them."""
        if not self.met:
            return "not measured"
        if len(set(self.met.values())) == 1:
            return "yes" if all(self.met.values()) else "no"
        return ", ".join(f"{name} {'yes' if met else 'no'}" for name, met in self.met.items())


def reached(results: Results) -> list[Reached]:
    """Every target, in the order of the table."""
    run = _Run(results)
    lines = [_ratio(run, ratio) for ratio in RATIOS]
    for transport in ("shm", "tcp"):
        lines += [_transfers(run, transport, count, bound) for count, bound in TIME_OF_TRANSFERS.items()]
        lines.append(_pool(run, transport))
    lines += _latency(run)
    for transport in ("shm", "tcp"):
        lines += [_crowd(run, transport), _fair(run, transport), _behind(run, transport)]
    return [*lines, _memory(run), _wire(run)]


class _Run:
    """Summaries by contestant and payload, and by point of a sweep."""

    def __init__(self, results: Results) -> None:
        self.compared: dict[tuple[str, str], tuple[Measurement, Summary]] = {}
        self.points: dict[tuple[str, str, float], tuple[Measurement, Summary]] = {}
        for measurement in results.measurements:
            summary = summarize(measurement)
            if summary is None or measurement.status != "ok":
                continue
            if measurement.sweep:
                key = (measurement.sweep, measurement.options["transport"], measurement.x)
                self.points[key] = measurement, summary
            else:
                self.compared[measurement.contestant, measurement.payload.name] = measurement, summary

    def goodput(self, contestant: str, payload: str) -> float | None:
        found = self.compared.get((contestant, payload))
        return found[1].goodput if found else None

    def point(self, sweep: str, transport: str, x: float) -> tuple[Measurement, Summary] | None:
        return self.points.get((sweep, transport, x))


def _line(what: str, bound: str, values: dict[str, float | None], holds: Callable[[float], bool]) -> Reached:
    there = {name: value for name, value in values.items() if value is not None}
    return Reached(what, bound, there, {name: holds(value) for name, value in there.items()})


def _ratio(run: _Run, ratio: Ratio) -> Reached:
    rivals = [g for key in ratio.against if (g := run.goodput(key, ratio.payload)) is not None]
    values: dict[str, float | None] = {}
    for place in PLACES:
        own = run.goodput(f"{ratio.ours}/{place}", ratio.payload)
        values[place.replace("-", " ")] = own / max(rivals) if own and rivals else None
    names = " or ".join(BY_KEY[key].label for key in ratio.against[:1])
    what = f"{ratio.ours.replace('/', ', ')}, {ratio.payload}: goodput / {names}"
    return _line(what, f"≥ {ratio.at_least:g}", values, lambda value: value >= ratio.at_least)


def _transfers(run: _Run, transport: str, count: int, bound: float) -> Reached:
    many, one = run.point("transfers", transport, count), run.point("transfers", transport, 1)
    value = many[1].p50 / one[1].p50 if many and one else None
    return _line(f"{transport}: time of {count} transfers / of 1", f"≤ {bound:g}", {"": value}, lambda v: v <= bound)


def _pool(run: _Run, transport: str) -> Reached:
    small, whole = run.point("pool", transport, SMALL_POOL), run.point("pool", transport, 1.0)
    value = small[1].goodput / whole[1].goodput if small and whole else None
    what = f"{transport}: goodput with a pool of 1/50 of the embedding / with one that holds it"
    return _line(what, f"≥ {OF_WHOLE_POOL:g}", {"": value}, lambda v: v >= OF_WHOLE_POOL)


def _latency(run: _Run) -> list[Reached]:
    ours: dict[str, float | None] = {}
    for place in PLACES:
        found = run.compared.get((f"shm/verified/{place}", "1 MiB"))
        ours[place.replace("-", " ")] = found[1].p50 * 1e3 if found else None
    peers = [s.p50 for (_, payload), (m, s) in run.compared.items() if payload == "1 MiB" and m.kind in CROSSING]
    ratios = {place: value / (min(peers) * 1e3) if value and peers else None for place, value in ours.items()}
    return [
        _line("shm, verified, 1 MiB: p50 in ms", f"≤ {LATENCY_S * 1e3:g}", ours, lambda v: v <= LATENCY_S * 1e3),
        _line("shm, verified, 1 MiB: p50 / that of the fastest other across processes", "< 1", ratios, lambda v: v < 1),
    ]


def _crowd(run: _Run, transport: str) -> Reached:
    many, one = run.point("crowd", transport, CROWD), run.point("crowd", transport, 1)
    value = many[1].goodput / one[1].goodput if many and one else None
    return _line(
        f"{transport}: goodput of {CROWD} at once / of one", f"≥ {OF_ONE:g}", {"": value}, lambda v: v >= OF_ONE
    )


def _fair(run: _Run, transport: str) -> Reached:
    many = run.point("crowd", transport, CROWD)
    value = fairness(many[0]) if many else None
    return _line(f"{transport}: Jain's fairness of {CROWD} equals", f"≥ {FAIR:g}", {"": value}, lambda v: v >= FAIR)


def _behind(run: _Run, transport: str) -> Reached:
    found = run.point("behind", transport, 0)
    times = behind(found[0]) if found else None
    value = max(times.behind) / quantile(times.alone, 0.99) if times else None
    what = f"{transport}: 1 MiB behind 403 MB, the longest wait / its p99 alone"
    return _line(what, f"≤ {WAIT_OVER_P99:g}", {"": value}, lambda v: v <= WAIT_OVER_P99)


def _memory(run: _Run) -> Reached:
    """The worst of our transports, in MiB. Where an embedding is used in place, the pool is the payload: it counts once."""
    beyond = {
        f"{m.label}, {m.payload.name}": (s.memory_beyond - (0 if m.options["in_place"] else m.pool_bytes)) / (1 << 20)
        for m, s in run.compared.values()
        if m.kind == "ours"
    }
    return _line("receiver's peak memory beyond payload and pool, MiB", "≤ 32", _worst(beyond), lambda v: v <= 32)


def _wire(run: _Run) -> Reached:
    wires = {
        f"{m.label}, {m.payload.name}": s.wire
        for m, s in run.compared.values()
        if m.kind == "ours" and s.wire and m.payload.size >= WIRE_FROM
    }
    return _line("bytes on the wire / payload", f"≤ {WIRE:g}", _worst(wires), lambda v: v <= WIRE)


def _worst(values: dict[str, float]) -> dict[str, float | None]:
    """The largest, under its own name."""
    name = max(values, key=values.__getitem__, default=None)
    return {} if name is None else {name: values[name]}
