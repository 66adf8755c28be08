"""Drawings of results: SVG, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from ..report import Drawing
from .results import Measurement, TransferResults
from .summary import Summary, summarize
from .sweeps import SWEEPS, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "ours": "#1f6feb",
    "engine": "#d9822b",
    "peer": "#a64d99",
    "limit": "#8b949e",
    "shm": "#1f6feb",
    "tcp": "#1a7f64",
}
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
"""Payloads up to this size are drawn by latency, larger ones by goodput."""


def drawings(results: TransferResults, compared: dict[str, list[Measurement]]) -> Iterator[Drawing]:
    """Yields two drawings for each payload that was compared, and one for each sweep."""
    with mpl.rc_context(STYLE):
        for name, measured in compared.items():
            if found := [(m, s) for m in measured if (s := summarize(m)) is not None]:
                yield from _compared(name, found)
        for sweep in SWEEPS:
            found = [(m, s) for m in results.measurements if m.sweep == sweep.name and (s := summarize(m)) is not None]
            if found and sweep.name != "blocking":  # its table says it all
                yield Drawing(sweep.title, sweep.note, _svg(_sweep(sweep, found)))


def _compared(name: str, found: Sequence[tuple[Measurement, Summary]]) -> Iterator[Drawing]:
    if found[0][0].payload.size <= SMALL_BYTES:
        bars = [_Bar(m.label, m.kind, s.p50 * 1e3, (s.p50 * 1e3, s.p99 * 1e3)) for m, s in found]
        figure = _bars(bars, "ms, p50 and p99", log=True, best_is_high=False)
        note = "Until the receiver may use the embedding. Bars are medians, lines reach to p99."
        yield Drawing(f"Latency, {name}", note, _svg(figure))
    else:
        figure = _bars([_goodput(m, s, m.kind) for m, s in found], "GB/s")
        yield Drawing(f"Goodput, {name}", "From array to array. Bars are medians, whiskers quartiles.", _svg(figure))
    # A copy inside one process has no two sides.
    both = [(m, s) for m, s in found if m.kind != "limit" or m.candidate == "socket"]
    bars = [_Bar(m.label, m.kind, s.sender_cpu + s.receiver_cpu, None, s.sender_cpu) for m, s in both]
    note = "CPU seconds of all threads per 10⁹ bytes. The darker part is the sender's."
    yield Drawing(f"CPU time, {name}", note, _svg(_bars(bars, "CPU s/GB", best_is_high=False)))


class _Bar(NamedTuple):
    label: str
    colour: str
    """A key of :data:`COLOURS`."""
    length: float
    whisker: tuple[float, float] | None
    part: float = 0.0
    """How much of it is drawn darker."""


def _goodput(m: Measurement, s: Summary, colour: str) -> _Bar:
    low, high = s.quartiles
    return _Bar(m.label, colour, s.goodput / 1e9, (low / 1e9, high / 1e9))


def _bars(bars: Sequence[_Bar], axis: str, *, log: bool = False, best_is_high: bool = True) -> Figure:
    """Draws horizontal bars, the best at the top."""
    ordered = sorted(bars, key=lambda bar: bar.length, reverse=not best_is_high)
    figure, axes = plt.subplots(figsize=(9.5, 0.9 + 0.27 * len(ordered)))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    for at, bar in enumerate(ordered):
        colour, end = COLOURS[bar.colour], bar.length
        axes.barh(at, bar.length, 0.68, color=colour, alpha=0.45 if bar.part else 0.85)
        axes.barh(at, bar.part, 0.68, color=colour, alpha=0.9)
        if bar.whisker is not None:
            low, end = bar.whisker
            errors = [[max(0.0, bar.length - low)], [max(0.0, end - bar.length)]]
            axes.errorbar(bar.length, at, xerr=errors, color=INK, linewidth=1, capsize=2.5)
        text = f"{bar.length:.2f} / {end:.2f}" if log else f"{bar.length:.2f}"
        axes.annotate(text, (end, at), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(ordered)), [bar.label for bar in ordered])
    for label, bar in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_color(COLOURS[bar.colour])
    if kinds := [kind for kind in LEGEND if any(bar.colour == kind for bar in ordered)]:
        swatches = [Rectangle((0, 0), 1, 1, color=COLOURS[kind], alpha=0.85) for kind in kinds]
        axes.legend(swatches, [LEGEND[kind] for kind in kinds], loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(PLAIN)
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.set_xlabel(axis)
    axes.margins(x=0.1)
    return figure


def _sweep(sweep: Sweep, found: Sequence[tuple[Measurement, Summary]]) -> Figure:
    if not sweep.axis:
        bars = [_goodput(m, s, m.options["transport"]) for m, s in found]
        return _bars(
            [bar._replace(label=f"{bar.label}, {m.payload.name}") for bar, (m, _) in zip(bars, found, strict=True)],
            "GB/s",
        )
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for transport in dict.fromkeys(m.options["transport"] for m, _ in found):
        points = sorted((m.x, s.goodput / 1e9, *s.quartiles) for m, s in found if m.options["transport"] == transport)
        xs, middle, low, high = zip(*points, strict=True)
        axes.plot(xs, middle, "o-", color=COLOURS[transport], label=transport, linewidth=2)
        axes.fill_between(xs, [v / 1e9 for v in low], [v / 1e9 for v in high], color=COLOURS[transport], alpha=0.15)
    axes.set_xscale("log")
    ticks = sorted({m.x for m, _ in found})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=sweep.axis, ylabel="GB/s")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    drawn = out.getvalue()
    return drawn[drawn.index("<svg") :]
