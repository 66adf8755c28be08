"""The report of ``embferry bench transfer``: which transport is how fast, then all figures, then our own targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

import numpy as np

from ..report import NONE, Report, Row, Table, cells, facts
from .results import Measurement, TransferResults

Columns = Mapping[str, Callable[[Measurement], str]]

CPU: Columns = {
    "CPU s/GB sender": lambda m: f"{m.cpu(lambda sample: sample.sender_cpu):.2f}" if m.crosses else NONE,
    "receiver": lambda m: f"{m.cpu(lambda sample: sample.receiver_cpu):.2f}",
}
SPEED: Columns = {
    "GB/s": lambda m: f"{m.goodput[0] / 1e9:.2f}",
    "quartiles": lambda m: " … ".join(f"{goodput / 1e9:.2f}" for goodput in m.goodput[1:]),
}
COMPARED: Columns = {
    "candidate": lambda m: m.label,
    **SPEED,
    "p50 ms": lambda m: f"{m.seconds(0.5) * 1e3:.2f}",
    "p99 ms": lambda m: f"{m.seconds(0.99) * 1e3:.2f}",
    **CPU,
    "memory + MB": lambda m: f"{max(s.memory_beyond for s in m.samples) / 1e6:.0f}" if m.crosses else NONE,
}
SWEPT: Columns = {
    "what": lambda m: m.label,
    "payload": lambda m: m.payload.name,
    **SPEED,
    "transfers": lambda m: NONE if (count := m.samples[-1].transfers) is None else str(count),
    **CPU,
    "fairness": lambda m: NONE if m.fairness is None else f"{m.fairness:.3f}",
}
WAITED: Columns = {
    "what": lambda m: m.label,
    "p50 ms of the small ones": lambda m: f"{np.median(_small(m)) * 1e3:.2f}",
    "longest": lambda m: f"{max(_small(m)) * 1e3:.2f}",
}
SWEEPS = {
    "pool": (
        "Size of the pool",
        SWEPT,
        "From 1/50 of the embedding to twice its size. What does not fit is sent by resumed transfers.",
    ),
    "concurrency": (
        "Transfers at once",
        SWEPT,
        "Embeddings of 8.4 MB share a pool of 134 MB. Fairness is Jain's index of their goodputs.",
    ),
    "blocking": (
        "Small embeddings behind a large one",
        WAITED,
        "40 of 1 MiB at once, alone and behind one of 403 MB; all share a pool of 134 MB.",
    ),
    "early": ("Early announcement", SWEPT, "The sender announces before the encoder runs, or only with the embedding."),
}
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
"""Our targets: transport and mode, whose goodput its own is divided by (67 MB, in place), and the least ratio."""
SWEPT_RATIOS = (
    ("pool/{}/0.02", "pool/{}/1", 0.8, "goodput with 1/50 of the pool / with all of it"),
    ("concurrency/{}/256", "concurrency/{}/1", 0.9, "goodput of 256 at once / of one"),
)


def report(results: TransferResults) -> Report:
    compared: dict[str, list[Measurement]] = {}
    swept: dict[str, list[Measurement]] = {}
    for m in results.measurements:
        (swept.setdefault(m.sweep, []) if m.sweep else compared.setdefault(m.payload.name, [])).append(m)
    tables = [
        *_transports(compared),
        *(_comparison(name, measured) for name, measured in compared.items()),
        *(_table(*SWEEPS[name], swept[name]) for name in SWEEPS if name in swept),
    ]
    if targets := list(reached(results)):
        met = {True: ("yes", "good"), False: ("no", "bad")}
        rows = [Row((t.what, f"≥ {t.bound:g}", f"{t.value:.3g}", met[t.met][0]), met[t.met][1]) for t in targets]
        tables.append(Table("Our own targets", ("what", "bound", "reached", "met"), tuple(rows), folded=True))
    return Report(
        verb="bench transfer",
        title="How fast embeddings travel",
        lead="Every transport of embferry beside other ways to move the same bytes from an array of one process to an "
        "array of another. The candidates take turns. Bars and whiskers are medians and quartiles of GB/s.",
        facts=facts(results),
        tables=tables,
        problems=[f"{m.label}, {m.payload.name}: {m.reason}" for m in results.measurements if m.status == "error"],
    )


def _transports(compared: dict[str, list[Measurement]]) -> Iterator[Table]:
    """Yields the answer: the fastest verified variant of each transport, and the fastest other way, by payload."""
    other, sizes = "fastest other way", {name: measured[0].payload.size for name, measured in compared.items()}
    rows: dict[str, dict[str, float]] = {}
    for m in chain.from_iterable(compared.values()):
        if m.measured and m.kind != "limit" and m.options.get("mode", "verified") == "verified":
            best = rows.setdefault(m.options["transport"] if m.kind == "ours" else other, {})
            best[m.payload.name] = min(best.get(m.payload.name, np.inf), m.seconds(0.5))
    if rows.keys() <= {other}:
        return
    largest = max(sizes, key=sizes.__getitem__)
    lines = []
    for name in sorted(rows, key=lambda name: (name == other, rows[name].get(largest, np.inf))):
        found = [name]
        for payload, size in sizes.items():
            time = rows[name].get(payload)
            found += [NONE, NONE] if time is None else [f"{time * 1e3:.2f}", f"{size / time / 1e9:.2f}"]
        lines.append(Row(tuple(found), "peer" if name == other else "ours"))
    columns = ("transport", *(f"{payload} {unit}" for payload in sizes for unit in ("ms", "GB/s")))
    note = "Median times, with checksums. An embedding is used in the pool or copied out of it, whichever is faster."
    yield Table("Which transport", columns, tuple(lines), note)


def _comparison(name: str, measured: list[Measurement]) -> Table:
    """Returns all candidates with one payload, the fastest first; those without figures are last."""
    payload, groups = measured[0].payload, len({m.group for m in measured})
    note = f"Median of {max(len(m.samples) for m in measured)} rounds."
    if groups > 1:
        note += f" In {groups} groups, because memory did not suffice for all at once."
    title = f"{name} ({payload.what}: {payload.tokens:,} tokens)" if payload.what else name
    return _table(title, COMPARED, note, sorted(measured, key=lambda m: -m.goodput[0] if m.measured else 0.0))


def _table(title: str, columns: Columns, note: str, measured: Iterable[Measurement]) -> Table:
    rows = []
    for m in measured:
        if m.measured:
            rows.append(Row(cells(columns, m), m.kind, m.goodput if "GB/s" in columns else None))
        else:
            rows.append(Row((m.label, f"{m.status.upper()}: {m.reason or 'no round has ended'}"), m.status))
    return Table(title, tuple(columns), tuple(rows), note)


def _small(m: Measurement) -> list[float]:
    """Returns the waits of the small embeddings of all rounds."""
    rooms = m.options["rooms"]
    return [wait for s in m.samples for wait, tokens in zip(s.waits, rooms, strict=True) if tokens == min(rooms)]


class Reached(NamedTuple):
    what: str
    bound: float
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.bound


def reached(results: TransferResults) -> Iterator[Reached]:
    """Yields every target, a ratio within one run, for which the run has the figures."""
    measured = [m for m in results.measurements if m.measured]
    goodput = {(m.candidate, "" if m.sweep else m.payload.name): m.goodput[0] for m in measured}
    ratios = [
        ((f"{ours}/in-place", "67 MB"), (other, "67 MB"), bound, f"{ours}, 67 MB in place: goodput / {other}")
        for ours, other, bound in RATIOS
    ]
    for transport in ("shm", "tcp"):
        for one, other, bound, what in SWEPT_RATIOS:
            ratios.append(((one.format(transport), ""), (other.format(transport), ""), bound, f"{transport}: {what}"))
    for mine, theirs, bound, what in ratios:
        if mine in goodput and theirs in goodput:
            yield Reached(what, bound, goodput[mine] / goodput[theirs])
