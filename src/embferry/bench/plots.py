"""Results as drawings: SVG, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from . import sweeps
from .results import Measurement, Results
from .summary import behind, quantile, summarize, total_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"ours": "#1f6feb", "engine": "#d9822b", "peer": "#a64d99", "limit": "#8b949e"}
TRANSPORTS = {"shm": "#1f6feb", "tcp": "#1a7f64", "http": "#6639ba", "mooncake": "#d9822b", "nixl": "#bf3989"}
LEGEND = {"ours": "embferry", "engine": "engine, called directly", "peer": "other way across", "limit": "limit"}
INK, FAINT = "#1f2328", "#d8dee4"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "embferry",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
SMALL_BYTES = 2 << 20


def drawings(results: Results) -> Iterator[tuple[str, str, str]]:
    """``(title, what to see, SVG)`` of each."""
    with mpl.rc_context(STYLE):
        for name, measured in _compared(results).items():
            if measured[0].payload.size <= SMALL_BYTES:
                yield f"Latency, {name}", _LATENCY, _svg(_latency(measured))
            else:
                yield f"Goodput, {name}", _GOODPUT, _svg(_goodput(measured))
            yield f"CPU time, {name}", _CPU, _svg(_cpu(measured))
        for sweep in sweeps.SWEEPS:
            points = [m for m in results.measurements if m.sweep == sweep.name and m.status == "ok" and m.samples]
            if points:
                draw = {"wait": _waits}.get(sweep.what, _lines if sweep.axis else _bars)
                yield sweep.title, _SWEEPS[sweep.name], _svg(draw(sweep, points))


_GOODPUT = "From tensor to tensor. Bars are medians, whiskers quartiles, dots every round."
_LATENCY = "From “the embedding is ready” to “the language side may use it”. Bars are medians, the mark is p99."
_CPU = "CPU seconds of all threads for 10⁹ bytes, sender and receiver."
_SWEEPS = {
    "transfers": "A resumed transfer for each part that is granted, four parts in the pool.",
    "pool": "Pools from 1/50 of the embedding to twice its size; the embedding is gathered.",
    "crowd": "Equals of 8.4 MB beside each other, a pool of 134 MB for all.",
    "behind": "Small transfers alone, and the same while a large one is under way.",
    "verify": "Checksums in line, taken while the encoder produces, or none.",
    "early": "Announced before the encoder runs, or only when the embedding is ready.",
}


def _compared(results: Results) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {}
    for measurement in results.measurements:
        if not measurement.sweep and measurement.status == "ok" and measurement.samples:
            found.setdefault(measurement.payload.name, []).append(measurement)
    return found


def _rows(count: int) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(9.5, 0.9 + 0.27 * count))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _goodput(measured: list[Measurement]) -> Figure:
    ordered = sorted(measured, key=lambda m: _goodput_of(m)[1])
    figure, axes = _rows(len(ordered))
    for at, measurement in enumerate(ordered):
        low, middle, high = _goodput_of(measurement)
        colour = COLOURS[measurement.kind]
        axes.barh(at, middle, 0.68, color=colour, alpha=0.85)
        axes.errorbar(middle, at, xerr=[[middle - low], [high - middle]], color=INK, linewidth=1, capsize=2.5)
        values = [measurement.payload.size / s.seconds / 1e9 for s in measurement.samples]
        axes.plot(values, [at] * len(values), ".", color=INK, markersize=2.5, alpha=0.45)
        axes.annotate(
            f"{middle:.2f}", (max(high, *values), at), (6, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    _labels(axes, ordered)
    axes.set_xlabel("GB/s")
    axes.margins(x=0.06)
    return figure


def _latency(measured: list[Measurement]) -> Figure:
    ordered = sorted(measured, key=lambda m: -quantile([s.seconds for s in m.samples], 0.5))
    figure, axes = _rows(len(ordered))
    for at, measurement in enumerate(ordered):
        times = [s.seconds * 1e3 for s in measurement.samples]
        middle, late = quantile(times, 0.5), quantile(times, 0.99)
        axes.barh(at, middle, 0.68, color=COLOURS[measurement.kind], alpha=0.85)
        axes.plot([middle, late], [at, at], color=INK, linewidth=0.8)
        axes.plot(late, at, "|", color=INK, markersize=9, markeredgewidth=1.6)
        axes.annotate(
            f"{middle:.2f} / {late:.2f}", (late, at), (6, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PLAIN)
    _labels(axes, ordered)
    axes.set_xlabel("ms: p50 / p99")
    axes.margins(x=0.14)
    return figure


def _cpu(measured: list[Measurement]) -> Figure:
    # A copy inside one process has no two sides.
    crossing = [(m, summarize(m)) for m in measured if m.kind != "limit" or m.contestant == "socket"]
    both = [(m, s.sender_cpu, s.receiver_cpu) for m, s in crossing if s is not None]
    ordered = sorted(both, key=lambda entry: -(entry[1] + entry[2]))
    figure, axes = _rows(len(ordered))
    for at, (measurement, sender, receiver) in enumerate(ordered):
        colour = COLOURS[measurement.kind]
        axes.barh(at, sender, 0.68, color=colour, alpha=0.9, label="sender" if at == 0 else None)
        axes.barh(at, receiver, 0.68, left=sender, color=colour, alpha=0.45, label="receiver" if at == 0 else None)
        axes.annotate(
            f"{sender + receiver:.2f}",
            (sender + receiver, at),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    _labels(axes, [entry[0] for entry in ordered])
    axes.set_xlabel("CPU s/GB: sender (full), receiver (light)")
    axes.margins(x=0.08)
    return figure


def _labels(axes: Axes, ordered: list[Measurement]) -> None:
    axes.set_yticks(range(len(ordered)), [m.label for m in ordered])
    for label, measurement in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_color(COLOURS[measurement.kind] if measurement.kind != "limit" else "#57606a")
    kinds = [kind for kind in LEGEND if any(m.kind == kind for m in ordered)]
    swatches = [Rectangle((0, 0), 1, 1, color=COLOURS[kind], alpha=0.85) for kind in kinds]
    axes.legend(swatches, [LEGEND[kind] for kind in kinds], loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4)
    axes.set_ylim(-0.7, len(ordered) - 0.3)


def _by_transport(points: list[Measurement]) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {}
    for point in sorted(points, key=lambda m: m.x):
        found.setdefault(point.options["transport"], []).append(point)
    return found


def _lines(sweep: sweeps.Sweep, points: list[Measurement]) -> Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for transport, measured in _by_transport(points).items():
        xs, triples = [m.x for m in measured], [_goodput_of(m) for m in measured]
        axes.plot(xs, [t[1] for t in triples], "o-", color=TRANSPORTS[transport], label=transport, linewidth=2)
        axes.fill_between(
            xs, [t[0] for t in triples], [t[2] for t in triples], color=TRANSPORTS[transport], alpha=0.15, linewidth=0
        )
    axes.set_xscale("log")
    ticks = sorted({m.x for m in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(sweep.axis)
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _bars(sweep: sweeps.Sweep, points: list[Measurement]) -> Figure:
    figure, axes = _rows(len(points))
    ordered = points[::-1]
    for at, point in enumerate(ordered):
        low, middle, high = _goodput_of(point)
        axes.barh(at, middle, 0.68, color=TRANSPORTS[point.options["transport"]], alpha=0.85)
        axes.errorbar(middle, at, xerr=[[middle - low], [high - middle]], color=INK, linewidth=1, capsize=2.5)
    axes.set_yticks(range(len(ordered)), [f"{m.label}, {m.payload.name}" for m in ordered])
    axes.set_xlabel("GB/s")
    return figure


def _waits(sweep: sweeps.Sweep, points: list[Measurement]) -> Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for point in points:
        times, transport = behind(point), point.options["transport"]
        if times is None:
            continue
        for waits, line, word in ((times.alone, "--", "alone"), (times.behind, "-", "behind")):
            ordered = sorted(wait * 1e3 for wait in waits)
            shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
            axes.step(
                ordered,
                shares,
                line,
                where="post",
                color=TRANSPORTS[transport],
                label=f"{transport}, {word}",
                linewidth=2,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PLAIN)
    axes.set_xlabel("ms until a transfer of 1 MiB may be used")
    axes.set_ylabel("share of transfers")
    axes.legend()
    return figure


def _goodput_of(measurement: Measurement) -> tuple[float, float, float]:
    """Quartile, median, quartile, GB/s."""
    size, times = total_bytes(measurement), [sample.seconds for sample in measurement.samples]
    low, middle, high = (size / quantile(times, share) / 1e9 for share in (0.75, 0.5, 0.25))
    return low, middle, high


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    drawn = out.getvalue()
    return drawn[drawn.index("<svg") :]
