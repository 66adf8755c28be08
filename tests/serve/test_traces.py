"""The spans of a router before our own workers, and what it tells workers of them."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from embferry.traces.context import parse
from embferry.traces.spans import Span
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import END, HOLD, tokens
from tests.serve.inside import Inside
from tests.traces.recorded import MALFORMED, OUTER, PARENT, client_span, facts, is_nested, named, outline, recorded

pytestmark = pytest.mark.asyncio

CHAT = "/v1/chat/completions"
ROOT = f"POST {CHAT}"
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}
BODY: dict[str, Any] = {"model": "shapes", "messages": user(PICTURE, "a secret question")}
TEXT: dict[str, Any] = {"model": "shapes", "messages": user("hi")}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    return recorded(monkeypatch)


def envelope(code: str) -> dict[str, Any]:
    return {"error": {"message": f"the worker failed with {code}", "code": code}}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_tree_under_the_span_of_its_client(
    inside: Inside, spans: list[Span], stream: bool
) -> None:
    response = await inside.post(CHAT, BODY | {"stream": stream}, headers={"traceparent": PARENT})
    assert response.status_code == 200
    assert outline(spans, OUTER) == f"{ROOT}(fetch encode generate)"
    assert is_nested(spans)
    assert {span.context.trace_id for span in spans} == {client_span().trace_id}
    root = named(spans, ROOT)
    assert (root.kind, named(spans, "encode").kind) == ("server", "client")
    expected = {"request": 1, "stream": stream, "images": 1, "videos": 0, "outcome": "answered", "attempts": 1}
    expected |= {"sounds": 0, "tokens": 64, "bytes": 4096, "transport": "shm", "transfers": 8}
    assert facts(root.attributes) == expected
    assert [name for _, name, _ in root.events] == ["first_token"]
    assert named(spans, "encode").attributes == {"embferry.worker": "encode0"}


async def test_workers_get_the_span_of_their_call_and_nothing_else_of_the_client(
    inside: Inside, spans: list[Span]
) -> None:
    headers = {"traceparent": PARENT, "tracestate": "vendor=x", "baggage": "user=ann"}
    await inside.post(CHAT, BODY, headers=headers)
    assert named(spans, ROOT).parent == parse(PARENT, "vendor=x")
    for worker, name in (("encode0", "encode"), ("language0", "generate")):
        (got,) = inside.fakes[worker].headers
        assert got["traceparent"] == named(spans, name).context.parent
        assert got["tracestate"] == "vendor=x"
        assert "baggage" not in got


@pytest.mark.parametrize("what", MALFORMED)
async def test_malformed_headers_count_as_none(
    inside: Inside, spans: list[Span], caplog: pytest.LogCaptureFixture, what: str
) -> None:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in MALFORMED[what]]
    with caplog.at_level(logging.INFO, "embferry"):
        response = await inside.post(CHAT, BODY, headers=headers)
    assert response.status_code == 200
    assert outline(spans) == f"{ROOT}(fetch encode generate)"
    assert named(spans, ROOT).context.state == ""
    assert all("trace" not in record.getMessage() for record in caplog.records)
    assert all("tracestate" not in got for got in inside.fakes["language0"].headers)


async def test_spans_hold_nothing_that_the_client_or_the_model_has_said(inside: Inside, spans: list[Span]) -> None:
    inside.fakes["language0"].script = [*tokens("hunter2"), END]
    headers = {"traceparent": PARENT, "authorization": "Bearer tok-key", "x-request-id": "my-own-id"}
    await inside.post(CHAT, BODY | {"user": "ann"}, headers=headers)
    told = json.dumps([[span.name, span.attributes, span.events, span.error] for span in spans])
    for secret in ("secret question", "hunter2", "tok-key", "my-own-id", "ann", "base64"):
        assert secret not in told


async def test_a_client_that_wants_no_spans_gets_none_also_from_workers(inside: Inside, spans: list[Span]) -> None:
    response = await inside.post(CHAT, BODY, headers={"traceparent": PARENT[:-2] + "00"})
    assert response.status_code == 200
    assert spans == []
    (got,) = inside.fakes["language0"].headers
    assert got["traceparent"].startswith(PARENT[:36])
    assert got["traceparent"].endswith("-00")


async def test_the_share_decides_where_the_client_does_not(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = recorded(monkeypatch, share=0.0)
    await inside.post(CHAT, BODY)
    assert spans == []
    await inside.post(CHAT, BODY, headers={"traceparent": PARENT})
    assert outline(spans, OUTER) == f"{ROOT}(fetch encode generate)"


async def test_without_traces_workers_get_no_headers(inside: Inside) -> None:
    await inside.post(CHAT, BODY, headers={"traceparent": PARENT, "tracestate": "vendor=x"})
    for worker in ("encode0", "language0"):
        (got,) = inside.fakes[worker].headers
        assert not {"traceparent", "tracestate"} & got.keys()


async def test_texts_need_no_encode(inside: Inside, spans: list[Span]) -> None:
    await inside.post(CHAT, TEXT)
    assert outline(spans) == f"{ROOT}(fetch generate)"


async def test_other_paths_have_a_tree_too(inside: Inside, spans: list[Span]) -> None:
    response = await inside.post("/tokenize", {"model": "shapes", "prompt": "hi"})
    assert response.status_code == 200, response.text
    assert outline(spans) == "POST /tokenize(fetch generate)"


@pytest.mark.parametrize(
    ("worker", "status", "code", "expected"),
    [
        ("encode0", 400, "image_truncated", "encode:image_truncated"),
        ("encode0", 500, "engine_error", "encode:engine_error"),
        ("language0", 400, "context_length_exceeded", "encode generate:context_length_exceeded"),
        ("language0", 503, "queue_full", "encode generate:queue_full"),
    ],
)
async def test_a_worker_that_refuses_marks_its_call_and_the_root(
    inside: Inside, spans: list[Span], worker: str, status: int, code: str, expected: str
) -> None:
    inside.fakes[worker].refusal = (status, envelope(code))
    response = await inside.post(CHAT, BODY)
    assert response.json()["error"]["code"] == code
    assert outline(spans) == f"{ROOT}:{code}(fetch {expected})"
    assert named(spans, ROOT).attributes["embferry.outcome"] == code


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ({"type": "error", **envelope("integrity_error")}, "integrity_error"),
        ("{not json", "worker_failed"),
        (None, "worker_failed"),
    ],
)
async def test_an_answer_that_fails_marks_its_call(inside: Inside, spans: list[Span], last: Any, code: str) -> None:
    inside.fakes["language0"].script = [*tokens("a "), *([last] if last else [])]
    response = await inside.post(CHAT, BODY | {"stream": True})
    assert response.status_code == 200
    assert code in response.text
    assert outline(spans) == f"{ROOT}:{code}(fetch encode generate:{code})"


async def test_a_second_attempt_is_in_the_same_tree(inside: Inside, spans: list[Span]) -> None:
    inside.workers = [inside.entry(name) for name in ("encode0", "encode1", "language0")]
    lost = {"type": "error", **envelope("peer_gone"), "status": 503, "retryable": True}
    inside.fakes["language0"].scripts = [[lost]]
    response = await inside.post(CHAT, BODY)
    assert response.status_code == 200, response.text
    assert outline(spans) == f"{ROOT}(fetch encode generate:peer_gone encode generate)"
    root = named(spans, ROOT)
    assert root.attributes["embferry.attempts"] == 2
    assert [name for _, name, _ in root.events] == ["second_attempt", "first_token"]
    assert root.events[0][2] == {"embferry.code": "peer_gone", "embferry.worker": "encode0"}


async def test_a_client_that_leaves_is_no_error(inside: Inside, spans: list[Span]) -> None:
    inside.fakes["language0"].script = [*tokens("a "), HOLD, END]
    async with inside.asking() as client:
        asking = asyncio.create_task(client.post(CHAT, json=BODY | {"stream": True}))
        while not inside.fakes["language0"].holding:
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert outline(spans) == f"{ROOT}(fetch encode generate)"
    assert named(spans, ROOT).attributes["embferry.outcome"] == "client left"


async def test_a_request_that_is_no_json_ends_its_tree(inside: Inside, spans: list[Span]) -> None:
    async with inside.asking() as client:
        response: httpx.Response = await client.post(CHAT, content=b"{")
    assert response.status_code == 400
    assert outline(spans) == f"{ROOT}:invalid_json(fetch:invalid_json)"
