"""The picture of one or several soaks, as SVG: what the processes hold, over the transfers."""

from __future__ import annotations

from typing import Any

WIDTH, HEIGHT, GAP, LEFT, TOP, BOTTOM = 250, 190, 60, 45, 34, 74
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: distinct for every eye
PANELS = (("rss", "resident memory, MiB", 2**20), ("fds", "descriptors", 1), ("threads", "threads", 1))
DASHES = ("none", "6 4", "2 3", "9 3 2 3")  # so that lines that lie on each other can be told apart
POINTS = 200
"""Most points of a line; each is the highest of its neighbourhood."""


def svg(results: list[dict[str, Any]]) -> str:
    """Returns the picture. Each result has ``transport`` and ``samples``."""
    lines = [
        (f"{role}, {result['transport']}", result["samples"], role)
        for result in results
        for role in ("sending", "receiving")
    ]
    width = LEFT + len(PANELS) * (WIDTH + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + BOTTOM}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{width}" height="{TOP + HEIGHT + BOTTOM}" fill="#fff"/>',
    ]
    for number, panel in enumerate(PANELS):
        parts += [f'<g transform="translate({LEFT + number * (WIDTH + GAP)} {TOP})">', *_panel(panel, lines), "</g>"]
    for number, (name, _, _) in enumerate(lines):
        x, y = LEFT + number * 150, TOP + HEIGHT + BOTTOM - 12
        parts.append(f'<path d="M{x} {y - 4}h22" {_look(number)}/>')
        parts.append(f'<text x="{x + 28}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: tuple[str, str, int], lines: list[tuple[str, list[dict[str, Any]], str]]) -> list[str]:
    sign, title, unit = panel
    values = [[(s["transfers"], s[role][sign] / unit) for s in samples] for _, samples, role in lines]
    most = max(x for line in values for x, _ in line)
    step = _step(max(y for line in values for _, y in line))
    top = step * 4
    parts = [f'<text x="0" y="-14" font-weight="bold">{title}</text>']
    for number in range(5):
        y = HEIGHT - HEIGHT * number / 4
        parts.append(f'<path d="M0 {y:g}h{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y + 4:g}" text-anchor="end">{step * number:g}</text>')
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        x, text = WIDTH * share, f"{round(most * share):,}"
        parts.append(f'<text x="{x:g}" y="{HEIGHT + 18}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<text x="{WIDTH / 2:g}" y="{HEIGHT + 34}" text-anchor="middle">transfers</text>')
    for number, line in enumerate(values):
        points = " ".join(f"{WIDTH * x / most:.1f},{HEIGHT - HEIGHT * y / top:.1f}" for x, y in _thinned(line))
        parts.append(f'<polyline points="{points}" {_look(number)}/>')
    return parts


def _look(number: int) -> str:
    colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    return f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dashes}"'


def _step(most: float) -> float:
    """Returns the distance of the four grid lines: the least round one under which everything fits."""
    return next(
        step for power in range(-3, 9) for step in (10**power, 2 * 10**power, 5 * 10**power) if 4 * step >= most
    )


def _thinned(line: list[tuple[int, float]]) -> list[tuple[int, float]]:
    size = -(-len(line) // POINTS)
    groups = [line[first : first + size] for first in range(0, len(line), size)]
    return [(group[-1][0], max(y for _, y in group)) for group in groups]
