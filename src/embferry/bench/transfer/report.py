"""The report of ``embferry bench transfer``: which transport is how fast, then all figures, then our own targets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from ..report import NONE, Report, Row, Table, facts
from .plots import drawings
from .results import Measurement, TransferResults
from .summary import fairness, summarize
from .sweeps import SWEEPS
from .targets import reached

COLUMNS = ("candidate", "GB/s", "quartiles", "p50 ms", "p99 ms", "CPU s/GB sender", "receiver", "memory + MB")
SWEPT = ("what", "payload", "GB/s", "quartiles", "transfers", "CPU s/GB sender", "receiver", "fairness")
WAITED = ("what", "p50 ms of the small ones", "longest")


def report(results: TransferResults) -> Report:
    compared: dict[str, list[Measurement]] = {}
    for measurement in results.measurements:
        if not measurement.sweep:
            compared.setdefault(measurement.payload.name, []).append(measurement)
    return Report(
        verb="bench transfer",
        title="How fast embeddings travel",
        lead="Every transport of embferry beside other ways to move the same bytes from an array of one process to an "
        "array of another. The candidates take turns.",
        facts=facts(results),
        tables=[
            *_transports(compared),
            *(_comparison(name, measured) for name, measured in compared.items()),
            *_swept(results),
            *_targets(results),
        ],
        drawings=list(drawings(results, compared)),
        problems=results.failed,
    )


def _transports(compared: dict[str, list[Measurement]]) -> Iterator[Table]:
    """Yields the answer: the fastest verified variant of each transport, and the fastest other way, by payload."""
    rows: dict[str, dict[str, float]] = {}
    for payload, measured in compared.items():
        for m in measured:
            name = m.options["transport"] if m.kind == "ours" else "fastest other way"
            summary = summarize(m)
            if summary is not None and m.kind != "limit" and m.options.get("mode", "verified") == "verified":
                best = rows.setdefault(name, {})
                best[payload] = min(best.get(payload, np.inf), summary.p50)
    other = rows.pop("fastest other way", None)
    if not rows:
        return
    sizes = {payload: measured[0].payload.size for payload, measured in compared.items()}
    largest = max(sizes, key=sizes.__getitem__)
    ordered = sorted(rows.items(), key=lambda item: item[1].get(largest, np.inf))
    lines = [(name, best, "ours") for name, best in ordered]
    if other:
        lines.append(("fastest other way", other, "peer"))
    columns = [f"{payload} {unit}" for payload in sizes for unit in ("ms", "GB/s")]
    yield Table(
        "Which transport",
        ("transport", *columns),
        tuple(
            Row((name, *(cell for payload in sizes for cell in _time(best.get(payload), sizes[payload]))), kind)
            for name, best, kind in lines
        ),
        "Median times, with checksums. An embedding is used in the pool or copied out of it, whichever is faster.",
    )


def _time(seconds: float | None, size: int) -> tuple[str, str]:
    return (NONE, NONE) if seconds is None else (f"{seconds * 1e3:.2f}", f"{size / seconds / 1e9:.2f}")


def _comparison(name: str, measured: list[Measurement]) -> Table:
    """Returns all candidates with one payload, the fastest first; those without figures are last."""
    rows = sorted((_row(m) for m in measured), key=lambda pair: -pair[0])
    payload, groups = measured[0].payload, len({m.group for m in measured})
    note = f"Median of {max(len(m.samples) for m in measured)} rounds."
    if groups > 1:
        note += f" In {groups} groups, because memory did not suffice for all at once."
    title = f"{name} ({payload.what}: {payload.tokens:,} tokens)" if payload.what else name
    return Table(title, COLUMNS, tuple(row for _, row in rows), note)


def _row(m: Measurement) -> tuple[float, Row]:
    s = summarize(m)
    if s is None:
        return 0.0, _failure(m)
    crosses = m.kind != "limit" or m.candidate == "socket"  # a copy within one process has one side
    cells = (
        m.label,
        f"{s.goodput / 1e9:.2f}",
        " … ".join(f"{goodput / 1e9:.2f}" for goodput in s.quartiles),
        f"{s.p50 * 1e3:.2f}",
        f"{s.p99 * 1e3:.2f}",
        f"{s.sender_cpu:.2f}" if crosses else NONE,
        f"{s.receiver_cpu:.2f}",
        f"{s.memory_beyond / 1e6:.0f}" if crosses else NONE,
    )
    return s.goodput, Row(cells, m.kind)


def _failure(m: Measurement) -> Row:
    return Row((m.label, f"{m.status.upper()}: {m.reason or 'no round has ended'}"), m.status)


def _swept(results: TransferResults) -> Iterator[Table]:
    for sweep in SWEEPS:
        if measured := [m for m in results.measurements if m.sweep == sweep.name]:
            columns = WAITED if sweep.name == "blocking" else SWEPT
            yield Table(sweep.title, columns, tuple(map(_point, measured)), sweep.note)


def _point(m: Measurement) -> Row:
    s = summarize(m)
    if s is None:
        return _failure(m)
    if m.sweep == "blocking":
        rooms = m.options["rooms"]
        small = [[wait for wait, tokens in zip(s.waits, rooms, strict=True) if tokens == min(rooms)] for s in m.samples]
        waits = list(chain.from_iterable(small))
        return Row((m.label, f"{np.median(waits) * 1e3:.2f}", f"{max(waits) * 1e3:.2f}"), "ours")
    fair = fairness(m)
    cells = (
        m.label,
        m.payload.name,
        f"{s.goodput / 1e9:.2f}",
        " … ".join(f"{goodput / 1e9:.2f}" for goodput in s.quartiles),
        str(m.samples[-1].transfers),
        f"{s.sender_cpu:.2f}",
        f"{s.receiver_cpu:.2f}",
        NONE if fair is None else f"{fair:.3f}",
    )
    return Row(cells, "ours")


def _targets(results: TransferResults) -> Iterator[Table]:
    rows = [
        Row((t.what, f"≥ {t.bound:g}", f"{t.value:.3g}", "yes" if t.met else "no"), "good" if t.met else "bad")
        for t in reached(results)
    ]
    if rows:
        yield Table("Our own targets", ("what", "bound", "reached", "met"), tuple(rows), folded=True)
