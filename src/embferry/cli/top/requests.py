"""Requests as lines with a bar of phases. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from embferry.cli.activity.words import BAD, MOVED, PLAIN, media_of, spent, state_of
from embferry.cli.top.bars import bar, nice_ceiling
from embferry.cli.top.board import Row
from embferry.cli.top.colours import KINDS, SOFT, STRONG
from embferry.cli.top.lines import cell, line

_WIDE = 90
"""Columns of a line that also has what was asked about."""
_NUMBER, _MEDIA, _TIME, _STATE, _SHORT_STATE = 7, 10, 8, 28, 20
_SHORTEST = 0.05
"""Seconds that a bar's whole width stands for, at least."""


def scale_of(rows: Sequence[Row]) -> float:
    """Returns the seconds that the longest bar can show."""
    return nice_ceiling(max((row.seconds for row in rows), default=0.0) or _SHORTEST)


def request_line(row: Row, scale: float, width: int, *, chosen: bool) -> Text:
    """Returns the line of a request.

    Args:
        row: the request.
        scale: seconds that the bar's whole width stands for.
        width: columns.
        chosen: the cursor is here.
    """
    request = row.request
    state = _STATE if width >= _WIDE else _SHORT_STATE
    media = _MEDIA if width >= _WIDE else 0
    room = width - 2 - _NUMBER - media - _TIME - 1 - state
    told = state_of(request, short=not media)
    if len(told) > state:
        told = state_of(request, short=True)
    is_good = request.ended is None or request.outcome in ("answered", "client left")
    style = (KINDS[MOVED] if request.ended is None else SOFT) if is_good else KINDS[BAD]
    parts = [
        line([("▶ " if chosen else "  ", KINDS[MOVED])], 2),
        cell(row.name, _NUMBER, STRONG if chosen else KINDS[PLAIN] if request.ended is None else SOFT),
    ]
    if media:
        parts.append(cell(media_of(request), media, SOFT))
    parts += [
        bar(request, request.phases, row.now, scale, max(1, room)),
        cell(spent(row.seconds), _TIME, SOFT, right=True),
        Text(" "),
        cell(told, state, style),
    ]
    return line(parts, width)
