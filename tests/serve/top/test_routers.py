"""Routers that go and return, refuse, or are none; and texts that try to do more than be read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from embferry.cli.activity import watch
from embferry.cli.activity.routers import Router
from embferry.cli.top.app import TopApp
from tests.cli.messages import event, hostile, message, request
from tests.serve.fakes import closed_port
from tests.serve.top.screen import Screen, watching
from tests.serve.top.scripted import Scripted

pytestmark = [pytest.mark.integration, pytest.mark.asyncio]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(watch, "LONGEST_PAUSE", 0.2)


async def test_a_router_that_goes_and_returns() -> None:
    async with Scripted(requests=[request(7)]) as router, watching(router.url) as screen:
        await screen.shows("routers", "● ready")
        await screen.shows("requests", "#7", "fetch")
        for _ in range(3):
            await router.stop()
            await screen.shows("routers", "○ no answer", router.url, "as it was ")
            await screen.shows("routers", "no server responds at")
            await screen.shows("routers", "trying again")
            await screen.shows("requests", "#7")  # as it was
            await screen.shows("fleet", "language 0")
            router.message = message(requests=[request(1)], now=1.0, events=[event(1, "failover", 0.5)])
            await router.start()
            await screen.shows("routers", "● ready")
            await screen.until(lambda: [line[2:4] for line in screen.all("requests")] == ["#1"])
            await screen.shows("events", "failover")
            router.message = message(requests=[request(7)])
            await router.stop()
            await router.start()
            await screen.shows("requests", "#7")
        assert len(screen.all("routers")) == 1


async def test_of_two_routers_one_may_be_gone() -> None:
    async with Scripted(requests=[request(1)]) as router:
        with closed_port() as nowhere:
            async with watching(nowhere, router.url) as screen:
                await screen.shows("routers", "a ○ no answer", nowhere)
                await screen.shows("routers", f"no server responds at {nowhere} ([Errno 111] Connection refused)")
                await screen.shows("routers", "b ● ready")
                await screen.shows("requests", "b#1")
                assert screen.all("fleet")[0] == f"a {nowhere}"


@pytest.mark.parametrize(
    ("refusal", "why"),
    [
        ((401, {}), "the router asks for an API key; set EMBFERRY_ROUTER_API_KEY to it"),
        ((503, {"error": {"message": "32 clients watch this router", "type": "x"}}), "32 clients watch this router"),
        ((404, {}), "is no router: it has status 404 for /activity/stream, or one of an older version"),
        ((500, "\x1b[2J"), "is no router: it has status 500 for /activity/stream"),
        ((503, {"error": {"message": "\x1b[2J[red]", "type": "x"}}), "\\x1b[2J[red]"),
    ],
)
async def test_a_router_that_refuses_is_asked_again(refusal: tuple[int, Any], why: str) -> None:
    async with Scripted() as router:
        router.refusal = refusal
        async with watching(router.url, size=(200, 40)) as screen:
            await screen.shows("routers", "○ no answer", router.url)
            await screen.until(lambda: why in " ".join(" ".join(screen.all("routers")).split()))
            await screen.until(lambda: len(router.asked) > 2)
            router.refusal = None
            await screen.shows("routers", "● ready")


async def test_the_api_key_is_sent_and_not_shown() -> None:
    async with Scripted() as router:
        app = TopApp([Router(router.url, api_key="sesame-7")])
        async with app.run_test() as pilot:
            screen = Screen(app, pilot)
            await screen.shows("routers", "● ready")
        assert b"authorization: Bearer sesame-7\r\n" in router.asked[0]
        assert b"accept-encoding: identity\r\n" in router.asked[0].lower()


@pytest.mark.parametrize(
    "data", [b"{", b"null", b'{"now": "x"}', b"\xff", json.dumps(message(requests=[{"number": 1}])).encode()]
)
async def test_a_message_of_another_form_is_told(data: bytes) -> None:
    async with Scripted() as router, watching(router.url, size=(200, 40)) as screen:
        await screen.shows("routers", "● ready")
        router.refusal = (404, {})
        await router.send(data)
        await screen.shows("routers", "○ no answer")
        router.refusal = None
        await screen.shows("routers", "● ready")


TEXTS = ["[bold red]x[/]", "\x1b[2J\x1b]0;title\x07", "\u202eabc", "\x9b2J", "红色", "", "a\nb\tc"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [(60, 24), (200, 50)])
async def test_no_text_of_a_router_is_markup_or_moves_the_cursor(text: str, size: tuple[int, int]) -> None:
    requests = [request(1, ("fetch", 0.0, None)), request(2, ("fetch", 0.0, 1.0))]
    full = message(requests=requests, events=[event(1, "worker_lost"), event(2, "x", worker="w", reason="r")])
    full = hostile(full | {"missing": ["m"]}, text)
    async with Scripted() as router:
        router.message = full
        async with watching(router.url, size=size) as screen:
            await screen.until(lambda: len(screen.all("requests")) == 2)
            await screen.press("enter")
            over = screen.seen("over")
            await screen.press("escape")
            lines = [line for name in ("routers", "fleet", "requests", "events") for line in screen.seen(name)]
            told = "".join(over + lines)
            assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 or letter == "\u202e" for letter in told)
            if text and size[0] == 200:
                escaped = text.encode("unicode_escape").decode() if text[0] in "\x1b\x9b\u202e" else text
                assert escaped.replace("\n", "\\n").replace("\t", "\\t")[:8] in told


@pytest.mark.parametrize("number", [-1e15, 1e15, 0.0, 1e-9])
async def test_odd_numbers_are_drawn(number: float) -> None:
    odd = [request(n, ("fetch", number, -number), ("x", 5.0, None), began=number, ttft=number) for n in (1, 2)]
    taken = abs(number)  # a time that is taken is not negative
    samples = {"ttft": [[99, 1, taken, taken, taken], [98, 0, 0, 0, 0]], "transfer": [[99, 3, taken, 0, taken]]}
    changes = {"requests": odd, "samples": samples, "events": [event(1, "error", number)]}
    async with Scripted(**changes) as router, watching(router.url) as screen:
        await screen.until(lambda: len(screen.all("requests")) == 2)
        await screen.press("enter")
        await screen.shows("over", "outcome")
        await screen.press("escape")
        await router.tell(now=number, requests=[], running=[1])
        await asyncio.sleep(0)
        await screen.until(lambda: len(screen.all("requests")) == 1)
