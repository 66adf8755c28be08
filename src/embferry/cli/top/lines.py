"""Lines of a given width. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from embferry.cli.wrapping import folded

Part = tuple[str, Style] | Text


def line(parts: Sequence[Part], width: int) -> Text:
    """Returns parts in a row, cut to a width. Texts are shown as they are: none is read as markup."""
    made = Text(no_wrap=True, end="")
    for part in parts:
        made.append(part) if isinstance(part, Text) else made.append(*part)
    made.truncate(width, overflow="ellipsis")
    return made


def cell(text: str, width: int, style: Style, *, right: bool = False) -> Text:
    """Returns a text in a column of a table, cut or filled up to its width."""
    made = Text(text, style, no_wrap=True, end="")
    made.truncate(width, overflow="ellipsis")
    gap = " " * (width - cell_len(made.plain))
    return Text(gap, end="").append(made) if right else made.append(gap)


def clock(wall: float) -> str:
    """Returns the time of day of a moment in seconds of the epoch."""
    try:
        return time.strftime("%H:%M:%S", time.localtime(wall))
    except (OverflowError, ValueError, OSError):  # no time of this calendar
        return "--:--:--"


def sentence(text: str, width: int, style: Style) -> list[Text]:
    """Returns a sentence on as many lines as it needs."""
    return [line([(one, style)], width) for one in folded(text, width).split("\n")]
