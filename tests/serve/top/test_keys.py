"""The keys, and that a part of the screen is drawn only when it changes."""

from __future__ import annotations

from typing import Any

import pytest

from embferry.cli.top.screens import Help, Timeline
from tests.cli.messages import event, request
from tests.serve.top.screen import Screen, watching
from tests.serve.top.scripted import Scripted

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]

TRANSFER = {"tokens": 40, "total_tokens": 64, "transfers": 4, "bytes": 4096, "transport": "shm"}
MOVING = request(
    3, ("fetch", 90.0, 91.0), ("encode", 91.0, 92.0), ("transfer", 92.0, None), transfer=TRANSFER, streams=True
)
REQUESTS = [
    MOVING,
    *(request(number, ("fetch", 80.0 - number, 81.0), ("decode", 81.0, 90.0 + number)) for number in (1, 2)),
]


def chosen(screen: Screen) -> list[str]:
    return [line.split("#")[1].split()[0] for line in screen.all("requests") if line.startswith("▶")]


async def test_enter_shows_the_timeline_of_the_chosen_request() -> None:
    async with Scripted(requests=REQUESTS) as router, watching(router.url) as screen:
        await screen.shows("requests", "#3")
        assert chosen(screen) == ["3"]
        await screen.press("enter")
        await screen.until(lambda: isinstance(screen.app.screen, Timeline))
        await screen.shows("over", "transfer", "+2.00 s", "t ↻3")
        for name, text in (
            ("asked", "/v1/chat/completions, 1 picture, streamed, at "),
            ("encoder", "encode 0 (encode0)"),
            ("language", "language 0 (language0)"),
            ("transfer", "40 of 64 tokens, 4.1 kB in all, over shm, in 1 initial and 3 resumed transfers"),
            ("outcome", "under way"),
            ("log", "number=3 in the router's log"),
        ):
            await screen.shows("over", f"{name:<13}{text}")
        await router.tell(requests=[{**MOVING, "ended": 101.0, "outcome": "no_worker"}], running=[])
        await screen.shows("over", "outcome      no_worker")
        await screen.press("down")
        await screen.until(lambda: screen.panel("over").border_title == "Request #2")
        await screen.press("down", "down")
        await screen.until(lambda: screen.panel("over").border_title == "Request #1")
        await screen.press("escape")
        assert chosen(screen) == ["1"]
        await screen.press("q")
        assert screen.app.return_code == 0


async def test_the_cursor_stays_on_its_request_while_others_come() -> None:
    async with Scripted(requests=REQUESTS) as router, watching(router.url, size=(120, 24)) as screen:
        await screen.shows("requests", "#3")
        await screen.press("down")
        assert chosen(screen) == ["2"]
        new = [request(number, ("fetch", 95.0, None)) for number in range(4, 34)]
        await router.tell(requests=new, running=[3, *(one["number"] for one in new)])
        await screen.until(lambda: len(screen.all("requests")) == 33)
        assert chosen(screen) == ["2"]
        await screen.press("end")
        assert chosen(screen) == ["1"]
        assert any(line.startswith("▶") for line in screen.seen("requests"))
        await screen.press("pageup", "k", "j", "home")
        assert chosen(screen) == ["3"]
        assert screen.seen("requests")[0].startswith("▶ #3")


async def test_a_click_opens_a_timeline() -> None:
    async with Scripted(requests=REQUESTS) as router, watching(router.url) as screen:
        await screen.shows("requests", "#1")
        await screen._pilot.click("#requests", offset=(10, 2))  # the title is above the first line
        await screen.until(lambda: isinstance(screen.app.screen, Timeline))
        await screen.until(lambda: screen.panel("over").border_title == "Request #2")


async def test_the_timeline_of_a_request_that_is_forgotten_closes() -> None:
    async with Scripted(requests=REQUESTS) as router, watching(router.url) as screen:
        await screen.shows("requests", "#3")
        await screen.press("enter")
        await screen.shows("over", "under way")
        await router.tell(first=True, requests=[])
        await screen.until(lambda: not isinstance(screen.app.screen, Timeline))
        await screen.shows("requests", "No request yet.")
        await screen.press("enter")  # there is none
        assert not isinstance(screen.app.screen, Timeline)


async def test_help_and_the_window_of_times() -> None:
    async with Scripted() as router, watching(router.url, size=(60, 24)) as screen:
        await screen.shows("times", "2 min ago")
        await screen.press("m")
        await screen.shows("times", "10 min ago")
        await screen.press("m")
        await screen.shows("times", "2 min ago")
        await screen.press("question_mark")
        await screen.until(lambda: isinstance(screen.app.screen, Help))
        await screen.shows("over", "Enter", "its timeline")
        for word in ("fetch", "encode", "transfer", "prefill", "decode", "answer"):
            await screen.shows("over", word)
        await screen.press("question_mark", "escape")
        await screen.until(lambda: not isinstance(screen.app.screen, Help))


@pytest.mark.parametrize("over", [(), ("enter",), ("question_mark",)])
async def test_ctrl_c_ends_it_from_every_screen(over: tuple[str, ...]) -> None:
    async with Scripted(requests=REQUESTS) as router, watching(router.url) as screen:
        await screen.shows("requests", "#3")
        await screen.press(*over, "ctrl+c")
        assert screen.app.return_code == 0


async def test_what_has_not_changed_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Scripted(requests=REQUESTS[1:], events=[event(1, "failover")]) as router, watching(router.url) as screen:
        await screen.shows("requests", "#1")
        await screen.shows("events", "failover")
        drawn: list[Any] = []
        for name in ("routers", "fleet", "requests", "events"):
            panel = screen.panel(name)

            monkeypatch.setattr(panel, "refresh", lambda *regions, name=name, **how: drawn.append((name, regions)))
        screen.app.redraw()
        assert drawn == []
        await router.tell(requests=[request(2, ("fetch", 80.0, 81.0), ("decode", 81.0, 95.0))], running=[])
        await screen.until(lambda: bool(drawn))
        assert {name for name, _ in drawn} == {"requests"}
