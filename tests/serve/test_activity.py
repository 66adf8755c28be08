"""Notes of both routers of their requests, as ``/activity`` tells it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import ANSWER, BREAK, DAMAGE, POOL, TRANSFER, Deployment, tokens
from tests.serve.inside import Inside, activity
from tests.serve.vllm.stubs import (
    answered,
    encoder_stubs,
    language_stubs,
    lost,
    picture,
    refused,
    request,
    routed,
    until,
)

CHAT = "/v1/chat/completions"
STREAM = "/activity/stream"
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}


def progress(count: int, transfers: int, **last: float) -> dict[str, Any]:
    told = {"type": "progress", "tokens": count, "total_tokens": 64, "transfers": transfers}
    return told | {"bytes": 4096, "transport": "shm"} | last


RESUMED = [progress(8, 1), progress(40, 5), progress(64, 8, seconds=0.25, ago=0.0), *ANSWER]


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
        if "embferry_router_client_" not in name and "http_requests" not in name:
            assert float(lines[name]) == value, name
    assert told["totals"]['embferry_router_transfers_total{phase="resumed"}'] == 3 * 7
    for series, metric in (("ttft", "first_token"), ("transfer", "transfer")):
        count, seconds = (sum(second[at] for second in told["samples"][series]) for at in (1, 2))
        assert count == float(lines[f"embferry_router_chat_{metric}_seconds_count"]) == 3
        assert seconds == pytest.approx(float(lines[f"embferry_router_chat_{metric}_seconds_sum"]), abs=1e-3)
    events = {event["kind"]: event for event in told["events"]}
    assert (events["error"]["count"], events["error"]["code"]) == (1, "invalid_request")
    assert lines['embferry_router_chat_errors_total{code="invalid_request"}'] == "1.0"


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
    assert told["totals"]["embferry_router_chat_second_attempts_total"] == 1


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
