"""The phases of a request as a bar, and times as columns of blocks. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from embferry.cli.activity.told import Phase, Request
from embferry.cli.top.colours import BACKGROUND, LINE, phase_colour

BLOCKS = " ▁▂▃▄▅▆▇█"
_LEVELS = len(BLOCKS) - 1
_STEPS = (1, 1.5, 2, 3, 5, 7.5, 10)


def bar(request: Request, phases: Sequence[Phase], now: float, scale: float, width: int) -> Text:
    """Returns phases of a request as a bar, which begins at the request's arrival.

    A cell belongs to the phase under its middle. A phase begins with its letter, so that bars can be read without
    colours; the transfer also has the number of its resumes, if there is room.

    Args:
        request: the request.
        phases: those of it to show.
        now: the end of a phase that is under way.
        scale: seconds that the whole width stands for.
        width: cells.
    """
    cells: list[Phase | None] = [None] * width
    for phase in phases:
        end_at = now if phase.end is None else phase.end
        begin, end = (_cell(at - request.began, scale, width) for at in (phase.begin, end_at))
        first, last = math.ceil(begin - 0.5), math.ceil(end - 0.5)
        cells[first:last] = [phase] * len(cells[first:last])
    if not any(cells) and cells and phases:  # shorter than a cell
        cells[min(width - 1, int(_cell(phases[-1].begin - request.began, scale, width)))] = phases[-1]
    made = Text(no_wrap=True, end="")
    at = 0
    while at < width:
        here, count = cells[at], 1
        while at + count < width and cells[at + count] is here:
            count += 1
        made.append(_segment(request, here, count))
        at += count
    return made


def _segment(request: Request, phase: Phase | None, count: int) -> Text:
    if phase is None:
        return Text(" " * count)
    words = phase.name[:1]
    if phase.name == "transfer" and request.resumes and len(longer := f"{words} ↻{request.resumes}") < count:
        words = longer
    return Text(words[:count].ljust(count), Style(color=BACKGROUND, bgcolor=phase_colour(phase.name)))


def _cell(seconds: float, scale: float, width: int) -> float:
    """Returns the place of a time in a bar, in cells."""
    return min(float(width), max(0.0, width * seconds / scale))


def gauge(parts: Sequence[tuple[float, str]], width: int) -> Text:
    """Returns a gauge whose parts are filled in their colours, each with at least a cell if it is above 0.

    Args:
        parts: (the part of the whole, its colour), from the left.
        width: cells.
    """
    made = Text(no_wrap=True, end="")
    left = width
    for part, colour in parts:
        count = min(left, max(round(part * width), 1 if part > 0 else 0))
        made.append("▄" * count, Style(color=colour))
        left -= count
    return made.append("▁" * left, Style(color=LINE))


def columns(
    values: Sequence[tuple[float, float] | None], top: float, height: int, strong: str, faint: str
) -> list[Text]:
    """Returns lines with a column for each pair: up to the first value strong, from there to the second one faint.

    Args:
        values: (mean, highest), or None for an empty column.
        top: the value at the upper edge.
        height: lines.
        strong: colour up to the mean.
        faint: colour up to the highest.
    """
    lines = []
    for line in range(height - 1, -1, -1):
        made = Text(no_wrap=True, end="")
        for pair in values:
            made.append(_block(pair, top, height, line, strong, faint))
        lines.append(made)
    return lines


def _block(pair: tuple[float, float] | None, top: float, height: int, line: int, strong: str, faint: str) -> Text:
    """Returns the part of a column in a line; line 0 is the lowest."""
    if pair is None:
        return Text(" ")
    # The lowest level is always there: a time of 0 is not the same as none.
    mean, highest = (max(1, round(min(value / top, 1.0) * height * _LEVELS)) - line * _LEVELS for value in pair)
    if mean >= _LEVELS:
        return Text(BLOCKS[_LEVELS], Style(color=strong))
    if mean <= 0:
        return Text(BLOCKS[max(0, min(highest, _LEVELS))], Style(color=faint))
    behind = faint if highest - mean > (_LEVELS - mean) / 2 else None
    return Text(BLOCKS[mean], Style(color=strong, bgcolor=behind))


def nice_ceiling(value: float) -> float:
    """Returns a round number that is not less than a value above 0."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in _STEPS if step * power >= value * 0.999), value)
