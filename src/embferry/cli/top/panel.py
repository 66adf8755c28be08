"""A part of the screen that shows lines, and draws only those that have changed."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip


class Panel(ScrollView):
    """Lines under a title. A line is made when it is seen, and sent to the terminal when it is another one."""

    DEFAULT_CSS = """
    Panel { border-top: solid $line; border-title-color: $foreground; border-title-style: bold;
            border-subtitle-color: $text-muted;
            padding: 0 1;
            background: $background; height: auto; overflow-x: hidden; overflow-y: auto;
            scrollbar-size-vertical: 1; scrollbar-background: $background; scrollbar-background-hover: $background;
            scrollbar-color: $line; }
    Panel:focus { border-top: solid $accent; }
    """

    def __init__(self, title: str, id: str) -> None:
        super().__init__(id=id)
        self.border_title = title
        self._line: Callable[[int], Text] = lambda number: Text()
        self._count = 0
        self._drawn: dict[int, Text] = {}

    @property
    def columns(self) -> int:
        """The width of a line."""
        return self.scrollable_content_region.width

    @property
    def lines(self) -> list[str]:
        """The texts of all lines."""
        return [self._line(number).plain for number in range(self._count)]

    def show(self, count: int, line: Callable[[int], Text]) -> None:
        """Shows so many lines."""
        if count != self._count:
            self._count = count
            self.virtual_size = Size(self.columns, count)
            self.refresh(layout=True)
        self._line = line
        top = self.scroll_offset.y
        for row in range(self.scrollable_content_region.height):
            made = self._made(top + row)
            if self._drawn.get(top + row) != made:
                self.refresh(Region(0, row, self.size.width, 1))

    def render_line(self, y: int) -> Strip:
        """Returns a line of the region that is seen."""
        number = self.scroll_offset.y + y
        made = self._drawn[number] = self._made(number)
        strip = Strip(made.render(self.app.console)).apply_style(self.rich_style)
        return strip.adjust_cell_length(self.columns, self.rich_style)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Returns the number of lines, for a panel whose height is theirs."""
        return self._count

    def _made(self, number: int) -> Text:
        return self._line(number) if number < self._count else Text()
