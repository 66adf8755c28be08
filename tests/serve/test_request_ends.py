"""A request has ended for everyone before its client has the whole answer: what it held is free, and it is counted.

A quick client asks the next request in the moment in which it gets the last part of the answer before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.types import Message

from embferry.serve.http.disconnect import before_end, run_until_disconnect
from embferry.serve.router.app import build
from embferry.serve.router.chat import Chat
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import tokens
from tests.serve.inside import Inside
from tests.serve.vllm.stubs import (
    BREAK,
    Call,
    Router,
    encoder_stubs,
    events_of,
    language_stubs,
    routed,
    streamed,
)

pytestmark = pytest.mark.asyncio

CHAT = "/v1/chat/completions"
ERROR = {"message": "it failed", "code": "engine_error", "status": 500, "retryable": False}
LIMITS = {"client_requests": 1}
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}
DEADLINE = 60.0


@contextlib.asynccontextmanager
async def ours(*, fails: bool) -> AsyncIterator[Router]:
    """Yields a router before workers of this project."""
    inside = Inside(**LIMITS)
    if fails:
        inside.fakes["language0"].script = [*tokens("a "), {"type": "error", "error": ERROR}]
    try:
        yield Router(build(inside.settings, httpx.ASGITransport(inside._app())))
    finally:
        inside.close()


@contextlib.asynccontextmanager
async def vllm(*, fails: bool) -> AsyncIterator[Router]:
    """Yields a router before instances of vLLM."""
    encoders, languages = encoder_stubs(1), language_stubs(1)
    if fails:
        languages[0].default = streamed(*events_of("a")[:2], BREAK)
    async with routed(*encoders, *languages, router=LIMITS) as router:
        yield router


class Quick(Call):
    """A client that does something else before the last part of its answer has been taken from the router."""

    def __init__(self, router: Router, body: bytes, then: Callable[[], Awaitable[Any]]) -> None:
        self._then, self.found = then, None
        super().__init__(router._app, CHAT, body, {})

    async def _send(self, message: Message) -> None:  # type: ignore[override]
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.found = await self._then()
            self.leave()  # the server says so, too, when it has sent the last part
        await super()._send(message)  # type: ignore[arg-type]


def body_of(*, stream: bool) -> bytes:
    request = httpx.Request("POST", "http://x", json={"messages": user(PICTURE, "?"), "stream": stream})
    return request.content


async def asked(router: Router, then: Callable[[], Awaitable[Any]], *, stream: bool) -> Any:
    call = Quick(router, body_of(stream=stream), then)
    await call.answer()
    return call.found


routers = pytest.mark.parametrize("before", [ours, vllm])
streams = pytest.mark.parametrize("stream", [False, True])
failures = pytest.mark.parametrize("fails", [False, True])


@routers
@streams
@failures
async def test_the_next_request_has_the_place_of_the_one_before(before: Any, stream: bool, fails: bool) -> None:
    async with before(fails=fails) as router:
        found = await asked(router, lambda: router.ask({"messages": user("?")}), stream=stream)
        assert found.status != 429, found.body


@routers
@streams
async def test_the_journal_tells_of_its_end(before: Any, stream: bool) -> None:
    async with before(fails=False) as router:
        told = (await asked(router, lambda: router.get("/activity"), stream=stream)).json()
        (one,) = told["requests"]
        assert (one["outcome"], told["running"], told["under_way"]) == ("answered", [], 0)


@routers
@streams
@failures
async def test_it_is_counted_and_holds_nothing(before: Any, stream: bool, fails: bool) -> None:
    async with before(fails=fails) as router:
        text = (await asked(router, lambda: router.get("/metrics"), stream=stream)).body.decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        requests = [value for name, value in values.items() if name.startswith("embferry_router_http_requests_total{")]
        counts = {CHAT in name: value for name, value in values.items() if "http_requests_total{" in name}
        assert requests
        assert counts[True] == "1.0"
        assert values["embferry_router_chat_seconds_count"] == "1.0"
        assert values["embferry_router_chat_in_flight"] == "0.0"
        assert values["embferry_process_held_bytes"] == "0.0"
        assert values["embferry_router_chat_aborted_total"] == "0.0"


@routers
@streams
async def test_its_line_is_logged(before: Any, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def lines() -> list[str]:
        return [record.__dict__["path"] for record in caplog.records if record.getMessage() == "request"]

    with caplog.at_level(logging.INFO, "embferry.serve.http.edge"):
        async with before(fails=False) as router:
            assert await asked(router, lines, stream=stream) == [CHAT]
            assert await lines() == [CHAT]


@streams
async def test_a_client_that_has_the_whole_answer_has_not_left(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server tells of its end as if the client had left, while the code behind the answer still runs."""
    ended = False
    generate = Chat._generate

    async def slowly(*arguments: Any) -> None:
        nonlocal ended
        await generate(*arguments)
        for _ in range(10):
            await asyncio.sleep(0)
        ended = True

    async def nothing() -> None:
        pass

    monkeypatch.setattr(Chat, "_generate", slowly)
    async with ours(fails=False) as router:
        await asked(router, nothing, stream=stream)
        assert ended, "the work was cancelled"
        assert await router.counted("chat_aborted_total") == 0
        told = (await router.get("/activity")).json()
        assert [one["outcome"] for one in told["requests"]] == ["answered"]
        assert "client_left" not in [event["kind"] for event in told["events"]]


async def test_work_is_cancelled_unless_the_client_has_all() -> None:
    async def gone() -> Message:
        return {"type": "http.disconnect"}

    left: list[str] = []
    for has_all, result in ((False, None), (True, "done")):

        async def work() -> str:
            for _ in range(10):
                await asyncio.sleep(0)
            return "done"

        async with asyncio.timeout(DEADLINE):
            found = await run_until_disconnect(work(), gone, lambda: left.append("left"), lambda: has_all)  # noqa: B023
        assert found == result
    assert left == ["left"]


async def test_the_call_comes_before_the_last_part() -> None:
    seen: list[Any] = []

    async def send(message: Message) -> None:
        seen.append(message.get("body", message["type"]))

    sending = before_end(send, lambda: seen.append("end"))
    await sending({"type": "http.response.start", "status": 200, "headers": []})
    await sending({"type": "http.response.body", "body": b"a", "more_body": True})
    await sending({"type": "http.response.body", "body": b"b"})
    assert seen == ["http.response.start", b"a", "end", b"b"]
