"""The stream of changes of the journal, and the API key that it needs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from embferry.serve.config import Settings
from embferry.serve.http import watching
from embferry.serve.http.serving import listen, serve_app
from embferry.serve.http.watching import MAX_WATCHERS
from embferry.serve.router.app import build
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import DEADLINE, closed_port
from tests.serve.inside import Inside, activity
from tests.serve.vllm.stubs import (
    HOLD,
    Call,
    Router,
    encoder_stubs,
    events_of,
    language_stubs,
    picture,
    request,
    routed,
    streamed,
)

CHAT = "/v1/chat/completions"
STREAM = "/activity/stream"
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}


# The stream


def events(call: Call) -> list[dict[str, Any]]:
    return [json.loads(block[6:]) for block in call.body.decode().split("\n\n") if block.startswith("data: ")]


@asynccontextmanager
async def watched(router: Router, count: int = 1) -> AsyncIterator[list[Call]]:
    calls = [router.call(b"", STREAM) for _ in range(count)]
    for call in calls:
        await call.until(lambda call=call: len(call.sent) > 1)  # type: ignore[misc]
    yield calls
    for call in calls:
        call.leave()
        await call.task


def test_the_stream_begins_with_everything_and_goes_on_with_changes() -> None:
    async def scenario() -> None:
        encoder, language = encoder_stubs(1)[0], language_stubs(1)[0]
        async with routed(encoder, language) as router:
            await router.ask(request(picture()))
            async with watched(router) as (call,):
                head = dict(call.sent[0]["headers"])
                assert head[b"content-type"] == b"text/event-stream; charset=utf-8"
                first = events(call)[0]
                assert (first["first"], [one["number"] for one in first["requests"]]) == (True, [1])
                language.behaviours = [streamed(*events_of("a"), HOLD)]
                asking = router.call(request(picture(), stream=True))
                await call.until(lambda: any(one["running"] == [2] for one in events(call)))
                language.release.set()
                await asking.answer()
                await call.until(lambda: any(one["outcome"] for told in events(call)[1:] for one in told["requests"]))
                later = events(call)[1:]
                assert not any(told["first"] for told in later)
                assert {one["number"] for told in later for one in told["requests"]} == {2}
                assert [told["version"] for told in events(call)] == sorted({told["version"] for told in events(call)})

    asyncio.run(scenario())


def test_a_stream_without_news_has_a_comment_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "HEARTBEAT", 0.0)
    monkeypatch.setattr(watching, "TICK", 0.001)

    async def scenario() -> None:
        async with routed(*encoder_stubs(1), *language_stubs(1)) as router, watched(router) as (call,):
            await call.until(lambda: call.body.count(b": nothing new\n\n") > 3)
            assert len(events(call)) == 1

    asyncio.run(scenario())


def test_so_many_may_watch_and_a_place_is_free_again_when_one_leaves() -> None:
    async def scenario() -> None:
        async with routed(*encoder_stubs(1), *language_stubs(1)) as router:
            async with watched(router, MAX_WATCHERS):
                answer = await router.get(STREAM)
                assert (answer.status, answer.error["code"]) == (503, "capacity_exhausted")
                assert "retry-after" in answer.headers
                assert (await router.get("/activity")).status == 200
            async with watched(router, MAX_WATCHERS):
                pass

    asyncio.run(scenario())


def test_streams_end_with_the_router() -> None:
    async def scenario() -> None:
        async with routed(*encoder_stubs(1), *language_stubs(1)) as router:
            call = router.call(b"", STREAM)
            await call.until(lambda: len(call.sent) > 1)
            await router._app.stop()
            await call.task
            assert call.sent[-1]["more_body"] is False

    asyncio.run(scenario())


@pytest.mark.integration
@pytest.mark.asyncio
async def test_a_router_that_ends_does_not_wait_for_those_that_watch(caplog: pytest.LogCaptureFixture) -> None:
    is_over, started = False, asyncio.Event()
    with closed_port() as nowhere, listen("127.0.0.1", 0) as listener:
        app = build(Settings(bootstrap_url=nowhere))
        serving = asyncio.create_task(
            serve_app(app, listener, started.set, app.stop, lambda: is_over, close_seconds=int(10 * DEADLINE))
        )
        async with asyncio.timeout(DEADLINE):
            await started.wait()
            reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            writer.write(f"GET {STREAM} HTTP/1.1\r\nHost: router\r\n\r\n".encode())
            await reader.readuntil(b"data: ")
            is_over = True
            assert (await reader.read()).endswith(b"\r\n0\r\n\r\n")  # the stream has its end
            await serving
        writer.close()
    assert not [record for record in caplog.records if "cut off" in record.getMessage()]


@pytest.mark.asyncio
async def test_pools_are_asked_for_only_while_there_is_a_reader(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    pool = inside._pool

    async def counted(call: Any) -> Any:
        nonlocal asked
        asked += 1
        return await pool(call)

    inside._pool = counted  # type: ignore[method-assign]
    async with inside.asking() as client:
        await client.post(CHAT, json={"messages": user(PICTURE, "?")})
        assert asked == 0
        for _ in range(5):
            await activity(client)
        assert asked == 1  # at most once a second
        monkeypatch.setattr(watching, "POOL_SECONDS", 0.0)
        await activity(client)
        assert asked == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("inside", [{"api_key": "right"}], indirect=True)
@pytest.mark.parametrize("path", ["/activity", STREAM])
async def test_data_need_the_api_key_and_the_page_does_not(inside: Inside, path: str) -> None:
    async with inside.asking() as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.get("/activity", headers={"authorization": "Bearer right"})).status_code == 200
        assert (await client.get("/")).status_code == 200
        assert (await client.post(path, headers={"authorization": "Bearer right"})).status_code == 405


@pytest.mark.asyncio
async def test_the_head_of_the_stream_ends(inside: Inside) -> None:
    async with inside.asking() as client:
        response = await client.head(STREAM)
    assert (response.status_code, response.content) == (200, b"")
