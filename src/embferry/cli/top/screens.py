"""The screens over the main one: the timeline of a request, and the help."""

from __future__ import annotations

from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from embferry.cli.top.board import Key
from embferry.cli.top.colours import ABOUT, SOFT, STRONG, phase_colour
from embferry.cli.top.lines import cell, line, sentence
from embferry.cli.top.panel import Panel

KEYS = {
    "↑ ↓": "choose a request; also k and j, Page Up, Page Down, Home, End, and the mouse",
    "Enter": "its timeline: when each phase began, how long it took, which workers, how many transfers",
    "Esc": "back from a timeline, or from this help",
    "m": "times of the last 2 or 10 minutes",
    "Tab": "go to another part of the screen, to scroll it",
    "q": "end; also Ctrl-C",
}
_SIGNS = {
    "t ↻3": "a transfer in four parts: the receive pool was smaller than the embedding, so it was resumed three times",
    "×2": "the second attempt, after a failure of a worker",
    "▄▄▁▁": "a receive pool: blocks in use, in quarantine, and free",
    "pale": "above a column of times: from their mean to the highest",
}
_LABEL = 10


class Over(ModalScreen[None]):
    """A screen with one panel over the main one, until a key closes it."""

    DEFAULT_CSS = """
    Over { align: center middle; background: $background 60%; }
    Over Panel { width: 90%; max-width: 110; max-height: 90%; background: $surface; border: round $line; }
    Over Panel:focus { border: round $accent; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q", "dismiss", "Back"),
        Binding("ctrl+c", "app.quit", show=False, priority=True),
    ]

    def __init__(self, title: str, hint: str = "Esc: back") -> None:
        super().__init__()
        self.panel = Panel(title, "over")
        self.panel.border_subtitle = hint

    def compose(self) -> ComposeResult:
        """Yields the panel."""
        yield self.panel


class Timeline(Over):
    """The timeline of a request.

    Attributes:
        key: of the request; up and down take the one before or behind it in the list.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "app.neighbour(-1)", "Before", show=False),
        Binding("down,j", "app.neighbour(1)", "Behind", show=False),
    ]

    def __init__(self, key: Key) -> None:
        super().__init__("Request", "↑ ↓: another one   Esc: back")
        self.panel.can_focus = False  # the arrows are the screen's
        self.key = key

    def show(self, title: str, lines: list[Text]) -> None:
        """Shows the lines."""
        self.panel.border_title = title
        self.panel.show(len(lines), lines.__getitem__)


class Help(Over):
    """The keys, and the meaning of the colours."""

    def __init__(self) -> None:
        super().__init__("Help")

    def on_mount(self) -> None:
        """Makes the lines when the width is known."""
        self.call_after_refresh(self._show)

    def on_resize(self) -> None:
        """Makes the lines anew."""
        self.call_after_refresh(self._show)

    def _show(self) -> None:
        lines = help_lines(self.panel.columns)
        self.panel.show(len(lines), lines.__getitem__)


def help_lines(width: int) -> list[Text]:
    """Returns the help."""
    made: list[Text] = []
    tables = (
        [(key, STRONG, text) for key, text in KEYS.items()],
        [(name, Style(color=phase_colour(name), bold=True), text) for name, text in ABOUT.items()],
        [(sign, STRONG, text) for sign, text in _SIGNS.items()],
    )
    for table in tables:
        made += [Text("")] if made else []
        for name, style, text in table:
            first, *rest = sentence(text, max(1, width - _LABEL), SOFT)
            made.append(line([cell(name, _LABEL, style), first], width))
            made += [line([(" " * _LABEL, SOFT), more], width) for more in rest]
    return made
