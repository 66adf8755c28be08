"""What is shown of results, as tables of text: once, for terminal, Markdown and page alike. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from . import sweeps
from .results import Measurement, Results
from .summary import behind, fairness, quantile, summarize
from .targets import reached

NONE = "–"
COLUMNS = (
    "contestant",
    "GB/s",
    "quartiles",
    "p50 ms",
    "p99 ms",
    "CPU s/GB sender",
    "receiver",
    "memory + MB",
    "wire",
)

_GOODPUTS = ("what", "payload", "GB/s", "quartiles", "transfers", "CPU s/GB sender", "receiver", "fairness")
_WAITED = ("what", "payload", "ms", "p50 ms alone", "p99 alone", "p50 behind", "longest behind")


class Row(msgspec.Struct, frozen=True):
    cells: tuple[str, ...]
    kind: str = ""
    """``ours``, ``engine``, ``peer`` or ``limit``; ``missing``, ``error`` or ``skipped``; ``yes``, ``no`` or
    ``unmeasured``."""

    @property
    def failed(self) -> bool:
        """Has a name and a reason instead of figures."""
        return self.kind in ("missing", "error", "skipped")


class Table(msgspec.Struct, frozen=True):
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


def tables(results: Results) -> list[Table]:
    """The comparison with each payload, the sweeps, the targets."""
    return [*comparisons(results), *swept(results), targets(results)]


def facts(results: Results) -> list[tuple[str, str]]:
    """When, where, with what."""
    m = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in m.versions.items() if version)
    return [
        ("command", results.command),
        ("date", f"{results.started}, {results.took_s:.0f} s" + (", quick" if results.quick else "")),
        ("machine", f"{m.cpu}, {m.cores} cores, {m.memory_bytes / 1e9:.0f} GB, {m.kernel}"),
        ("huge pages for shared memory", m.shmem_huge_pages or NONE),
        ("versions", versions),
    ]


def comparisons(results: Results) -> Iterator[Table]:
    """One table a payload, the fastest first; who could not take part is below, with the reason."""
    by_payload: dict[str, list[Measurement]] = {}
    for measurement in results.measurements:
        if not measurement.sweep:
            by_payload.setdefault(measurement.payload.name, []).append(measurement)
    for name, measured in by_payload.items():
        groups = {m.group for m in measured}
        notes = [f"median of {_rounds(measured)} rounds"]
        if len(groups) > 1:
            notes.append(f"in {len(groups)} groups, for memory did not allow for all at once")
        payload = measured[0].payload
        what = f"{name} ({payload.what}: {payload.tokens:,} tokens)" if payload.what else name
        yield Table(what, COLUMNS, tuple(map(_row, sorted(measured, key=_order))), "; ".join(notes))


def swept(results: Results) -> Iterator[Table]:
    for sweep in sweeps.SWEEPS:
        measured = [m for m in results.measurements if m.sweep == sweep.name]
        if measured:
            columns = _GOODPUTS if sweep.what == "goodput" else _WAITED
            cells = _goodput if sweep.what == "goodput" else _waits
            rows = tuple(
                _failure(m, len(columns)) or Row((m.label, m.payload.name, *cells(m)), "ours") for m in measured
            )
            yield Table(sweep.title, columns, rows)


def targets(results: Results) -> Table:
    rows = []
    for line in reached(results):
        values = ", ".join(f"{name} {_digits(value)}".strip() for name, value in line.values.items())
        kind = {"yes": "yes", "not measured": "unmeasured"}.get(line.verdict, "no")
        rows.append(Row((line.what, line.bound, values or NONE, line.verdict), kind))
    return Table("Where it has to be", ("what", "bound", "reached", "met"), tuple(rows))


def _digits(value: float) -> str:
    """Enough to see on which side of its bound it is."""
    return f"{value:.4f}" if abs(value - 1) < 0.01 else f"{value:.3g}" if value >= 10 else f"{value:.3f}"


def _rounds(measured: list[Measurement]) -> int:
    return max((len(m.samples) for m in measured), default=0)


def _order(measurement: Measurement) -> tuple[bool, float]:
    summary = summarize(measurement) if measurement.status == "ok" else None
    return (summary is None, -summary.goodput if summary else 0.0)


def _row(measurement: Measurement) -> Row:
    if failure := _failure(measurement, len(COLUMNS)):
        return failure
    s = summarize(measurement)
    assert s is not None  # whoever is ok has samples
    size = measurement.payload.size
    own = measurement.kind != "limit"
    cells = (
        measurement.label,
        f"{s.goodput / 1e9:.2f}",
        f"{size / s.high / 1e9:.2f} … {size / s.low / 1e9:.2f}",
        f"{s.p50 * 1e3:.2f}",
        f"{s.p99 * 1e3:.2f}",
        f"{s.sender_cpu:.2f}" if own or measurement.contestant == "socket" else NONE,
        f"{s.receiver_cpu:.2f}",
        f"{s.memory_beyond / 1e6:.0f}" if own or measurement.contestant == "socket" else NONE,
        NONE if s.wire is None else f"{s.wire:.4f}",
    )
    return Row(cells, measurement.kind)


def _failure(measurement: Measurement, columns: int) -> Row | None:
    if measurement.status == "ok":
        return None
    words = (measurement.label, f"{measurement.status.upper()}: {measurement.reason}")
    return Row(words + ("",) * (columns - 2), measurement.status)


def _goodput(measurement: Measurement) -> tuple[str, ...]:
    s = summarize(measurement)
    assert s is not None
    size = s.goodput * s.p50
    fair = fairness(measurement)
    transfers = measurement.samples[-1].details.get("transfers")
    return (
        f"{s.goodput / 1e9:.2f}",
        f"{size / s.high / 1e9:.2f} … {size / s.low / 1e9:.2f}",
        NONE if transfers is None else str(transfers),
        f"{s.sender_cpu:.2f}",
        f"{s.receiver_cpu:.2f}",
        NONE if fair is None else f"{fair:.3f}",
    )


def _waits(measurement: Measurement) -> tuple[str, ...]:
    s, times = summarize(measurement), behind(measurement)
    assert s is not None
    if times is None:
        return (f"{s.p50 * 1e3:.0f}", NONE, NONE, NONE, NONE)
    waits = (quantile(times.alone, 0.5), quantile(times.alone, 0.99), quantile(times.behind, 0.5), max(times.behind))
    return (f"{s.p50 * 1e3:.0f}", *(f"{wait * 1e3:.2f}" for wait in waits))
