"""The report of ``embferry bench transfer``: which transport is how fast, then all figures, then our own targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import numpy as np

from ..report import NONE, Report, Row, Table, cells, facts
from . import targets
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
COST: Columns = {
    "what": lambda m: m.label,
    "transfers/s": lambda m: f"{m.count / m.seconds(0.5):.0f}",
    "p50 ms": lambda m: NONE if math.isnan(m.wait(0.5)) else f"{m.wait(0.5) * 1e3:.2f}",
    "CPU ms sender": lambda m: f"{m.cpu_of_one(lambda sample: sample.sender_cpu) * 1e3:.3f}",
    "receiver": lambda m: f"{m.cpu_of_one(lambda sample: sample.receiver_cpu) * 1e3:.3f}",
}
WAITED: Columns = {
    "what": lambda m: m.label,
    "p50 ms": lambda m: f"{m.wait(0.5) * 1e3:.2f}",
    "p99 ms": lambda m: f"{m.wait(0.99) * 1e3:.2f}",
    "longest": lambda m: f"{m.wait(1) * 1e3:.2f}",
}
CONNECT: Columns = {
    "what": lambda m: m.label,
    "p50 ms": lambda m: f"{m.seconds(0.5) * 1e3:.2f}",
    "p99 ms": lambda m: f"{m.seconds(0.99) * 1e3:.2f}",
}
SWEEPS = {
    "small": ("Small transfers", COST, "CPU time of one transfer, from opening the room to its end."),
    "rooms": (
        "Small transfers beside open rooms",
        COST,
        "The other rooms are announced and idle. Their signs of life are switched off: they are not a transfer's cost.",
    ),
    "trust": ("A key, and TLS", COST, "Connections are open already. CPU time of one transfer, as above."),
    "connect": (
        "Connecting",
        CONNECT,
        "A new receiver each round: both of its connections are made, with the proofs and handshakes, then one token.",
    ),
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
    "behind": (
        "Small embeddings behind a large one",
        WAITED,
        "One after another, alone and while one of 403 MB is under way; all share a pool of 134 MB.",
    ),
    "early": ("Early announcement", SWEPT, "The sender announces before the encoder runs, or only with the embedding."),
}


def report(results: TransferResults, *others: TransferResults) -> Report:
    """Returns the report of one run, with the targets that it has reached together with ``others``."""
    compared: dict[str, list[Measurement]] = {}
    swept: dict[str, list[Measurement]] = {}
    for m in results.measurements:
        (swept.setdefault(m.sweep, []) if m.sweep else compared.setdefault(m.payload.name, [])).append(m)
    tables = [
        *_transports(compared),
        *(_comparison(name, measured) for name, measured in compared.items()),
        *(_table(*SWEEPS[name], swept[name]) for name in SWEEPS if name in swept),
    ]
    if (own := targets.table([results, *others])) is not None:
        tables.append(own)
    return Report(
        verb="bench transfer",
        title="How fast embeddings travel",
        lead="Every transport of embferry beside other ways to move the same bytes from an array of one process to an "
        "array of another. The candidates take turns. Bars and whiskers are medians and quartiles of GB/s.",
        facts=facts(results),
        tables=tables,
        problems=[
            f"{m.label}, {m.payload.name}: {m.reason}"
            for run in (results, *others)
            for m in run.measurements
            if m.status == "error"
        ],
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
