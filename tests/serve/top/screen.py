"""The screen of ``embferry top`` without a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from textual.pilot import Pilot

from embferry.cli.activity.routers import Router
from embferry.cli.top.app import TopApp
from embferry.cli.top.panel import Panel
from tests.serve.fakes import DEADLINE


class Screen:
    """The program, and keys for it."""

    def __init__(self, app: TopApp, pilot: Pilot[None]) -> None:
        self.app, self._pilot = app, pilot

    def panel(self, name: str) -> Panel:
        """Returns a part of the screen that is on top."""
        return self.app.screen.query_one(f"#{name}", Panel)

    def all(self, name: str) -> list[str]:
        """Returns every line of a part, also those that are scrolled away."""
        return [line.rstrip() for line in self.panel(name).lines]

    def seen(self, name: str) -> list[str]:
        """Returns the lines of a part as they are drawn."""
        panel = self.panel(name)
        return [panel.render_line(row).text.rstrip() for row in range(panel.scrollable_content_region.height)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds."""
        for _ in range(int(DEADLINE / 0.02)):
            await self._pilot.pause()
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the condition did not come true")

    async def shows(self, name: str, *words: str) -> None:
        """Waits until a line of a part has all words."""
        try:
            await self.until(lambda: any(all(word in line for word in words) for line in self.all(name)))
        except AssertionError:
            raise AssertionError(f"{words} are not in: {self.all(name)}") from None

    async def press(self, *keys: str) -> None:
        """Presses keys."""
        await self._pilot.press(*keys)
        if self.app.return_code is None:  # it has not ended
            await self._pilot.pause()

    async def resize(self, width: int, height: int) -> None:
        """Gives the terminal another size."""
        await self._pilot.resize_terminal(width, height)
        await self._pilot.pause()


@asynccontextmanager
async def watching(*urls: str, size: tuple[int, int] = (120, 40)) -> AsyncIterator[Screen]:
    """Runs the program for routers within the context."""
    app = TopApp([Router(url) for url in urls])
    async with app.run_test(size=size) as pilot:
        yield Screen(app, pilot)
