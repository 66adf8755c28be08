"""A plot of the time to first token by the rate of requests, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import msgspec

from .advice import Row
from .outcome import Outcome

RATES = 12
"""Rates at which each line has a point."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 64, 24, 56, 48
STYLE = """
.back { fill: #ffffff } .ink { fill: #0f172a } .soft { fill: #57606a } .grid { stroke: #d8dee4 }
.asked { stroke: #57606a; stroke-dasharray: 6 4 }
.undivided { stroke: #64748b; fill: #64748b } .split { stroke: #2563eb; fill: #2563eb } path { fill: none }
.line { fill: none; stroke-width: 2 } .tail { fill: none; stroke-width: 1.5; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } .ink { fill: #e6edf3 } .soft { fill: #9da7b3 } .grid { stroke: #30363d }
.asked { stroke: #9da7b3 }
.undivided { stroke: #94a3b8; fill: #94a3b8 } .split { stroke: #60a5fa; fill: #60a5fa } }
"""


class Line(msgspec.Struct, frozen=True):
    """One deployment: seconds to the first token in the median and at the 95th percentile, by requests a second."""

    kind: str
    """``undivided`` or ``split``: the class of its colour."""
    name: str
    points: tuple[tuple[float, float, float], ...]


def line(row: Row, most: float, play: Callable[[float], Outcome]) -> Line:
    """Returns the line of a deployment.

    Args:
        row: The deployment.
        most: The highest rate of the plot; the line ends where the deployment carries no more.
        play: Returns what comes of a rate.
    """
    rates = [most * (number + 1) / RATES for number in range(RATES)]
    outcomes = [(rate, play(rate)) for rate in rates if rate <= row.capacity or rate == rates[0]]
    points = tuple((rate, outcome.ttft(0.5), outcome.ttft(0.95)) for rate, outcome in outcomes)
    return Line("split" if row.deployment.is_split else "undivided", row.deployment.name, points)


def svg(lines: Sequence[Line], rate: float | None = None) -> str:
    """Returns the plot; ``rate``: what is asked, marked by a vertical line."""
    across = max((point[0] for one in lines for point in one.points), default=1.0) * 1.02
    across = max(across, (rate or 0.0) * 1.02)
    up = max((point[2] for one in lines for point in one.points), default=1.0) * 1.05

    def x(value: float) -> float:
        return LEFT + value / across * (WIDTH - LEFT - RIGHT)

    def y(seconds: float) -> float:
        return HEIGHT - BOTTOM - seconds / up * (HEIGHT - TOP - BOTTOM)

    title = "Time to first token, ms, by requests/s"
    drawn = [f'<text class="ink" x="16" y="22" font-weight="600">{title}</text>']
    for value in ticks(up):
        drawn.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(_text("soft", LEFT - 8, y(value) + 4, f"{value * 1e3:,.0f}", "end"))
    for value in ticks(across):
        drawn.append(_text("soft", x(value), HEIGHT - BOTTOM + 18, f"{value:g}", "middle"))
    if rate is not None:
        drawn.append(f'<path class="asked" d="M{x(rate):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        drawn.append(_text("soft", x(rate), TOP - 6, f"{rate:g} asked", "middle"))
    for number, one in enumerate(lines):
        for column, kind in ((1, "line"), (2, "tail")):
            way = "L".join(f"{x(point[0]):.1f} {y(point[column]):.1f}" for point in one.points)
            drawn.append(f'<path class="{one.kind} {kind}" style="fill: none" d="M{way}"/>')
        left = LEFT + 320 * number
        drawn.append(f'<path class="{one.kind} line" d="M{left} {HEIGHT - 14}h24"/>')
        drawn.append(_text("ink", left + 32, HEIGHT - 10, one.name, "start"))
    drawn.append(_text("soft", WIDTH - RIGHT, 22, "solid: median; dotted: 95th percentile", "end"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif"'
    back = f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>'
    return "\n".join([f'{head} font-size="12">', f"<style>{STYLE}</style>", back, *drawn, "</svg>", ""])


def ticks(most: float) -> list[float]:
    """Returns four to ten round values from 0 up to ``most``."""
    step = 1e-6
    while most / step > 10:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    return [round(number * step, 9) for number in range(int(most / step) + 1)]


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
