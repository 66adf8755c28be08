"""The program: watches the routers, and shows what they tell."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from collections.abc import Sequence
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.theme import Theme
from textual.widgets import Footer

from embferry.cli.activity.routers import Router
from embferry.cli.activity.told import Told
from embferry.cli.activity.watch import watch
from embferry.cli.top.board import Board
from embferry.cli.top.colours import ACCENT, BACKGROUND, CARD, LINE, TEXT
from embferry.cli.top.events import event_lines
from embferry.cli.top.fleet import fleet_lines
from embferry.cli.top.header import router_lines
from embferry.cli.top.panel import Panel
from embferry.cli.top.request_list import RequestList
from embferry.cli.top.screens import Help, Timeline
from embferry.cli.top.timeline import timeline_lines
from embferry.cli.top.times import times_lines

REDRAW_SECONDS = 0.5
"""Between two messages bars grow so often: little enough for a slow connection."""
RECENT_SECONDS = 300.0
"""Time within which resumes, retries and errors, and workers that were lost, are told beside a router."""
WINDOWS = (120.0, 600.0)
"""Seconds of the times that can be shown; the router keeps the longer one."""
LINES = {("-wide", "-low"): 2, ("-wide", "-middle"): 3, ("-wide", "-roomy"): 4, ("-narrow", "-roomy"): 3}
"""Lines of a series, by the width and the height of the screen; 1 otherwise."""


class TopApp(App[None]):
    """The screen.

    Args:
        routers: those that are watched.
    """

    TITLE = "embferry"
    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]  # noqa: RUF012  (textual has no ClassVar there)
    VERTICAL_BREAKPOINTS = [(0, "-tiny"), (15, "-low"), (22, "-middle"), (36, "-roomy")]  # noqa: RUF012
    CSS = """
    Screen { layout: vertical; }
    #routers { border-top: none; max-height: 40%; }
    #routers:focus { border-top: none; }
    #body { layout: vertical; height: 1fr; }
    #left, #right { height: auto; }
    #fleet { max-height: 12; }
    #requests { height: 1fr; min-height: 4; }
    #events { height: 6; }
    .-narrow #left { height: 1fr; }
    .-narrow #right { height: auto; }
    .-narrow.-middle #events { height: 4; }
    .-narrow.-low #events { display: none; }
    .-narrow.-low #fleet { max-height: 5; }
    .-tiny #fleet { max-height: 4; }
    .-narrow.-tiny #right { display: none; }
    .-wide #body { layout: horizontal; }
    .-wide #left { width: 2fr; height: 1fr; }
    .-wide #right { width: 1fr; height: 1fr; }
    .-wide #fleet { max-height: 50%; }
    .-wide #events { height: 1fr; }
    Footer { background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("m", "window", "2 / 10 min"),
        Binding("question_mark", "help", "Help", key_display="?"),
    ]

    def __init__(self, routers: Sequence[Router]) -> None:
        super().__init__()
        self.register_theme(
            Theme(
                "embferry", primary=ACCENT, accent=ACCENT, foreground=TEXT, background=BACKGROUND, surface=CARD,
                variables={"line": LINE}, dark=True,
            )
        )  # fmt: skip
        self.theme = "embferry"
        self._routers = routers
        self.board = Board([router.shown_url for router in routers])
        self._head, self._fleet = Panel("", "routers"), Panel("Fleet", "fleet")
        self._requests, self._times = RequestList(), Panel("Times", "times")
        self._events = Panel("Resumes, retries and errors", "events")
        self._window = WINDOWS[0]

    def get_css_variables(self) -> dict[str, str]:
        """Returns the variables of the style sheets."""
        return {"line": LINE} | super().get_css_variables()

    def compose(self) -> ComposeResult:
        """Yields the parts of the screen."""
        yield self._head
        with Container(id="body"):
            with Container(id="left"):
                yield self._fleet
                yield self._requests
            with Container(id="right"):
                yield self._times
                yield self._events
        yield Footer()

    def on_mount(self) -> None:
        """Begins to watch the routers."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self.exit)
        for place, router in enumerate(self._routers):
            watching = watch(router, functools.partial(self._hear, place), functools.partial(self._lose, place))
            self.run_worker(watching)
        self._requests.focus()
        self.set_interval(REDRAW_SECONDS, self.redraw)
        self.call_after_refresh(self.redraw)

    def on_resize(self) -> None:
        """Draws for the new size, when the parts have theirs."""
        self.call_after_refresh(self.redraw)

    def _hear(self, place: int, told: Told) -> None:
        self.board.routers[place].hear(told, time.monotonic(), time.time())
        self.redraw()

    def _lose(self, place: int, why: str, pause: float) -> None:
        self.board.routers[place].lose(why, time.monotonic(), pause)
        self.redraw()

    def redraw(self) -> None:
        """Draws what is known now."""
        if not self.screen_stack or self._head.columns < 1:  # before the first layout, and at the end
            return
        at = time.monotonic()
        head = [
            text
            for router in self.board.routers
            for text in router_lines(router, at, RECENT_SECONDS, self._head.columns)
        ]
        fleet = fleet_lines(self.board, self._fleet.columns)
        times = times_lines(self.board, at, self._window, self._times.columns, self._series_lines)
        events = event_lines(self.board, self._events.columns)
        for panel, lines in ((self._head, head), (self._fleet, fleet), (self._times, times), (self._events, events)):
            panel.show(len(lines), lines.__getitem__)
        self._requests.show_rows(self.board.rows(at), self.board.more())
        if isinstance(self.screen, Timeline):
            self._draw_timeline(self.screen, at)

    @property
    def _series_lines(self) -> int:
        """The lines of a series of times."""
        main = self.screen_stack[0]
        return next((lines for names, lines in LINES.items() if main.has_class(*names)), 1)

    def _draw_timeline(self, screen: Timeline, at: float) -> None:
        row = self.board.row(screen.key, at)
        if row is None:
            self._requests.focus()
            screen.dismiss()  # it ended long ago, and the router tells of later ones
        else:
            screen.show(f"Request {row.name}", timeline_lines(row, screen.panel.columns))

    def on_request_list_opened(self, message: RequestList.Opened) -> None:
        """Opens a timeline."""
        self.push_screen(Timeline(message.key))
        self.call_after_refresh(self.redraw)

    def action_neighbour(self, by: int) -> None:
        """Has the timeline of the request before or behind the one that is shown."""
        if isinstance(self.screen, Timeline):
            self._requests.action_move(by)
            if (key := self._requests.chosen) is not None:
                self.screen.key = key
            self.redraw()

    def action_help(self) -> None:
        """Opens the help."""
        if len(self.screen_stack) == 1:
            self.push_screen(Help())

    def action_window(self) -> None:
        """Shows the times of the other window."""
        self._window = WINDOWS[1 - WINDOWS.index(self._window)]
        self.redraw()


def run(routers: Sequence[Router]) -> None:
    """Runs the program until it is ended. Its messages to the terminal go to standard error, as those of textual do."""
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    TopApp(routers).run()
