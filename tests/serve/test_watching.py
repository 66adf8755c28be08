"""The journal over HTTP: what both routers note of their requests, and the stream of changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from embferry.serve.config import Settings
from embferry.serve.http import watching
from embferry.serve.http.serving import listen, serve_app
from embferry.serve.http.watching import MAX_WATCHERS
from embferry.serve.router.app import build
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import ANSWER, BREAK, DAMAGE, DEADLINE, POOL, TRANSFER, Deployment, closed_port, tokens
from tests.serve.inside import Inside
from tests.serve.vllm.stubs import (
    HOLD,
    Call,
    Router,
    answered,
    encoder_stubs,
    events_of,
    language_stubs,
    lost,
    picture,
    refused,
    request,
    routed,
    streamed,
    until,
)

CHAT = "/v1/chat/completions"
STREAM = "/activity/stream"
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}


def progress(count: int, transfers: int, **last: float) -> dict[str, Any]:
    told = {"type": "progress", "tokens": count, "total_tokens": 64, "transfers": transfers}
    return told | {"bytes": 4096, "transport": "shm"} | last


RESUMED = [progress(8, 1), progress(40, 5), progress(64, 8, seconds=0.25, ago=0.0), *ANSWER]


@pytest.fixture
def inside(request: pytest.FixtureRequest) -> Any:
    deployment = Inside(**dict(getattr(request, "param", {})))
    yield deployment
    deployment.close()


async def activity(client: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await client.get("/activity")).json())


def phases(told: dict[str, Any]) -> list[str]:
    return [name for name, _, _ in told["phases"]]


# Before workers of this project


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_its_phases_workers_and_transfers(inside: Inside, stream: bool) -> None:
    inside.fakes["language0"].script = RESUMED
    async with inside.asking() as client:
        assert (await client.post(CHAT, json={"messages": user(PICTURE, "?"), "stream": stream})).status_code == 200
        told = await activity(client)
    (one,) = told["requests"]
    assert phases(one) == ["fetch", "encode", "transfer", "prefill", "decode"]
    assert (one["path"], one["streams"], one["images"], one["videos"]) == (CHAT, stream, 1, 0)
    assert (one["encoders"], one["language"]) == (["encode0"], "language0")
    assert (one["outcome"], one["attempts"], told["running"], told["under_way"]) == ("answered", 1, [], 0)
    grants = TRANSFER["initial"] + TRANSFER["resumed"]  # type: ignore[operator]
    shown = {name: TRANSFER[name] for name in ("total_tokens", "bytes", "transport")}
    assert one["transfer"] == {"tokens": TRANSFER["total_tokens"], "transfers": grants, **shown}
    (event,) = [event for event in told["events"] if event["kind"] == "resumed"]
    assert (event["count"], event["request"]) == (TRANSFER["resumed"], one["number"])


@pytest.mark.asyncio
async def test_the_language_worker_is_asked_to_tell_of_progress(inside: Inside) -> None:
    """A worker that is older ignores it and tells of none; the rest is as ever."""
    async with inside.asking() as client:
        await client.post(CHAT, json={"messages": user(PICTURE, "?")})
        assert inside.fakes["language0"].requests[0]["progress"] is True
        (one,) = (await activity(client))["requests"]
    assert phases(one) == ["fetch", "encode", "decode"]
    assert one["transfer"]["transfers"] == 8


@pytest.mark.asyncio
async def test_its_numbers_are_those_of_the_metrics(inside: Inside) -> None:
    inside.fakes["language0"].script = RESUMED
    async with inside.asking() as client:
        for number in range(3):
            await client.post(CHAT, json={"messages": user(PICTURE, f"{number}?")})
        await client.post(CHAT, json={"messages": []})
        told = await activity(client)
        metrics = (await client.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    for name, value in told["totals"].items():
        if "embferry_client_" not in name and "http_requests" not in name:
            assert float(lines[name]) == value, name
    assert told["totals"]['embferry_transfers_total{phase="resumed"}'] == 3 * 7
    for series, metric in (("ttft", "first_token"), ("transfer", "transfer")):
        count, seconds = (sum(second[at] for second in told["samples"][series]) for at in (1, 2))
        assert count == float(lines[f"embferry_chat_{metric}_seconds_count"]) == 3
        assert seconds == pytest.approx(float(lines[f"embferry_chat_{metric}_seconds_sum"]), abs=1e-3)
    events = {event["kind"]: event for event in told["events"]}
    assert (events["error"]["count"], events["error"]["code"]) == (1, "invalid_request")
    assert lines['embferry_chat_errors_total{code="invalid_request"}'] == "1.0"


SECRETS = ("hunter2", "alice", "private.example", "tok-key")


@pytest.mark.asyncio
@pytest.mark.parametrize("inside", [{"api_key": "tok-key"}], indirect=True)
async def test_nothing_that_a_client_has_sent_is_told(inside: Inside) -> None:
    inside.fakes["language0"].script = [*tokens("hunter2"), *RESUMED]
    headers = {"authorization": "Bearer tok-key", "x-request-id": "alice-hunter2"}
    elsewhere = {"type": "image_url", "image_url": {"url": "https://private.example/alice.png"}}
    bodies: list[dict[str, Any]] = [
        {"messages": user(PICTURE, "hunter2"), "user": "alice"},
        {"messages": user(elsewhere, "hunter2")},
        {"messages": user("?"), "model": "hunter2"},
        {"messages": user("?"), "hunter2": "alice"},
    ]
    async with inside.asking(headers=headers) as client:
        for body in bodies:
            await client.post(CHAT, json=body)
        text = (await client.get("/activity")).text
    assert len(json.loads(text)["requests"]) == len(bodies)
    assert not [secret for secret in (*SECRETS, pictures.data_url(pictures.png())[30:60]) if secret in text]


@pytest.mark.integration
@pytest.mark.parametrize(("failure", "kind"), [(DAMAGE, "damaged"), (BREAK, "worker_failed")])
def test_a_failure_and_the_second_attempt_are_events(
    deployment: Deployment, http: httpx.Client, failure: str, kind: str
) -> None:
    deployment.workers.append(deployment.entry("language1"))
    deployment.wait(lambda: http.get("/ready").json()["workers"]["language"] == 2)
    deployment.fakes["language0"].scripts = [[failure]]
    assert http.post(CHAT, json={"messages": user(PICTURE, "?")}).status_code == 200
    told = http.get("/activity").json()
    seen = [event for event in told["events"] if event["kind"] not in ("worker_found", "resumed")]
    assert [(event["kind"], event["worker"]) for event in seen] == [
        (kind, "language0"),
        ("second_attempt", "language0"),
    ]
    (one,) = told["requests"]
    assert (one["attempts"], one["outcome"]) == (2, "answered")
    assert phases(one) == ["fetch", "encode", "decode"]
    assert told["totals"]["embferry_chat_second_attempts_total"] == 1


@pytest.mark.asyncio
async def test_an_error_ends_the_request_with_its_code(inside: Inside) -> None:
    inside.workers.clear()
    async with inside.asking() as client:
        assert (await client.post(CHAT, json={"messages": user(PICTURE, "?")})).status_code == 503
        told = await activity(client)
    assert [one["outcome"] for one in told["requests"]] == ["no_worker"]
    assert [(event["kind"], event["code"]) for event in told["events"]] == [("error", "no_worker")]
    assert told["missing"]


@pytest.mark.integration
def test_workers_that_come_and_go_and_their_pools_are_told(deployment: Deployment, http: httpx.Client) -> None:
    deployment.wait(lambda: http.get("/ready").status_code == 200)
    told = http.get("/activity").json()
    assert [(one["id"], one["role"], one["up"]) for one in told["workers"]] == [
        ("encode0", "encode", True), ("language0", "language", True),
    ]  # fmt: skip
    assert [one | {"url": ""} for one in told["pools"]] == [{"worker": "language0", "url": "", **POOL}]
    assert [(event["kind"], event["worker"]) for event in told["events"]] == [
        ("worker_found", "encode0"), ("worker_found", "language0"),
    ]  # fmt: skip
    deployment.workers = deployment.workers[:1]
    deployment.wait(lambda: len(http.get("/activity").json()["workers"]) == 1)
    last = http.get("/activity").json()["events"][-1]
    assert (last["kind"], last["worker"]) == ("worker_lost", "language0")


@pytest.mark.integration
def test_a_client_that_leaves_is_told_of(deployment: Deployment, http: httpx.Client) -> None:
    deployment.wait(lambda: http.get("/ready").status_code == 200)
    deployment.fakes["language0"].script = [*tokens("a"), "hold"]
    with http.stream("POST", CHAT, json={"messages": user("?"), "stream": True}) as response:
        next(response.iter_lines())
    deployment.wait(lambda: not http.get("/activity").json()["running"])
    told = http.get("/activity").json()
    assert [one["outcome"] for one in told["requests"]] == ["client left"]
    assert told["events"][-1]["kind"] == "client_left"


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


# Before vLLM


def test_a_request_before_vllm_has_its_phases_and_instances() -> None:
    async def scenario() -> None:
        encoder, language = encoder_stubs(1)[0], language_stubs(1)[0]
        async with routed(encoder, language) as router:
            for stream in (True, False):
                await router.ask(request(picture(), stream=stream))
            told = (await router.get("/activity")).json()
            first, second = told["requests"]
            assert phases(first) == ["fetch", "encode", "answer", "decode"]
            assert phases(second) == ["fetch", "encode", "answer"]
            assert (first["encoders"], first["language"]) == ([encoder.url], language.url)
            assert (first["images"], first["streams"], second["streams"]) == (1, True, False)
            assert {one["outcome"] for one in told["requests"]} == {"answered"}
            count = sum(second[1] for second in told["samples"]["ttft"])
            assert count == await router.counted("chat_first_token_seconds_count") == 1
            assert (told["engine"], told["pools"]) == ("vllm", None)

    asyncio.run(scenario())


def test_failures_before_vllm_are_events() -> None:
    async def scenario() -> None:
        encoders, languages = encoder_stubs(2), language_stubs(2)
        async with routed(*encoders, *languages) as router:
            for encoder in encoders:
                encoder.behaviours = [lost()]
            await router.ask(request(picture(b"1")))
            for language in languages:
                language.behaviours = [lost(), answered()]
            await router.until_up(encode=2, language=2)
            await router.ask(request(picture(b"2")))
            await until(lambda: not any(language.holding for language in languages))
            told = (await router.get("/activity")).json()
            kinds = [event["kind"] for event in told["events"]]
            assert {"worker_failed", "encode_retry", "second_attempt", "worker_lost", "worker_found", "error"} <= {
                *kinds
            }
            for kind, metric in (
                ("second_attempt", "chat_second_attempts_total"),
                ("encode_retry", "encode_retries_total"),
            ):
                noted = sum(event["count"] for event in told["events"] if event["kind"] == kind)
                assert noted == await router.counted(metric)

    asyncio.run(scenario())


def test_a_refusal_of_an_instance_ends_the_request() -> None:
    async def scenario() -> None:
        encoder, language = encoder_stubs(1)[0], language_stubs(1)[0]
        async with routed(encoder, language) as router:
            language.behaviours = [refused(400)]
            assert (await router.ask(request({"type": "text", "text": "?"}))).status == 400
            (one,) = (await router.get("/activity")).json()["requests"]
            assert (one["outcome"], phases(one)) == ("instance", ["fetch", "answer"])

    asyncio.run(scenario())
