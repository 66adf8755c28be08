"""The requests, with a cursor that stays on its request while others come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from embferry.cli.ask import counted
from embferry.cli.top.board import Key, Row
from embferry.cli.top.colours import SOFT
from embferry.cli.top.panel import Panel
from embferry.cli.top.requests import request_line, scale_of

NONE = "No request yet."


class RequestList(Panel):
    """The requests. The cursor is on the first one until it is moved."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "first", "First", show=False),
        Binding("end", "last", "Last", show=False),
        Binding("enter", "open", "Timeline"),
    ]

    class Opened(Message):
        """A request was chosen."""

        def __init__(self, key: Key) -> None:
            super().__init__()
            self.key = key

    def __init__(self) -> None:
        super().__init__("Requests", "requests")
        self._rows: Sequence[Row] = ()
        self._more = 0
        self._chosen: Key | None = None  # None: the first, whichever that is

    def show_rows(self, rows: Sequence[Row], more: int) -> None:
        """Shows requests, and the number of others under way."""
        self._rows, self._more = rows, more
        if self._chosen is not None and self._chosen not in [row.key for row in rows]:
            self._chosen = None
        scale, chosen, width = scale_of(rows), self._place, self.columns

        def line(number: int) -> Text:
            if number < len(rows):
                return request_line(rows[number], scale, width, chosen=number == chosen)
            if rows:
                return Text(f"  {counted(more, 'more request')} under way", SOFT)
            return Text(NONE, SOFT)

        self.show(len(rows) + bool(more) if rows else 1, line)

    @property
    def chosen(self) -> Key | None:
        """The request under the cursor."""
        return self._rows[self._place].key if self._rows else None

    @property
    def _place(self) -> int:
        return next((number for number, row in enumerate(self._rows) if row.key == self._chosen), 0)

    def action_move(self, by: int) -> None:
        """Moves the cursor."""
        self._go(self._place + by)

    def action_page(self, by: int) -> None:
        """Moves the cursor by a page."""
        self._go(self._place + by * max(1, self.scrollable_content_region.height - 1))

    def action_first(self) -> None:
        """Moves the cursor to the first request, where it stays while requests come and go."""
        self._chosen = None
        self._shown_at(0)

    def action_last(self) -> None:
        """Moves the cursor to the last request."""
        self._go(len(self._rows) - 1)

    def action_open(self) -> None:
        """Opens the timeline of the request under the cursor, where the cursor stays."""
        if (key := self.chosen) is not None:
            self._chosen = key
            self.post_message(self.Opened(key))

    def on_click(self, event: events.Click) -> None:
        """Opens the timeline of the request that was clicked."""
        place = self.scroll_offset.y + event.get_content_offset_capture(self).y
        if 0 <= place < len(self._rows):
            self._go(place)
            self.action_open()

    def _go(self, place: int) -> None:
        if self._rows:
            place = min(len(self._rows) - 1, max(0, place))
            self._chosen = self._rows[place].key
            self._shown_at(place)

    def _shown_at(self, place: int) -> None:
        """Scrolls to a line, and draws both the old and the new place of the cursor."""
        self.show_rows(self._rows, self._more)
        height, top = self.scrollable_content_region.height, self.scroll_offset.y
        if place < top:
            self.scroll_to(y=place, animate=False)
        elif place >= top + height:
            self.scroll_to(y=place - height + 1, animate=False)
