"""The spans of a router before instances of vLLM, and what it tells them of its spans."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from embferry.traces.spans import Span
from tests.serve.vllm.stage_stubs import stages
from tests.serve.vllm.stubs import (
    BREAK,
    ROLE,
    Stub,
    encoder_stubs,
    events_of,
    held,
    lost,
    picture,
    refused,
    request,
    routed,
    streamed,
    text,
    until,
)
from tests.traces.recorded import MALFORMED, OUTER, PARENT, is_nested, named, outline, recorded

pytestmark = pytest.mark.asyncio

ROOT = "POST /v1/chat/completions"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    return recorded(monkeypatch)


def two() -> tuple[Stub, Stub]:
    return Stub("enc0", "encode"), Stub("lang", "language")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_tree_under_the_span_of_its_client(spans: list[Span], stream: bool) -> None:
    async with routed(*two()) as router:
        answer = await router.ask(request(picture(), text(), stream=stream), traceparent=PARENT)
    assert answer.status == 200
    inner = "generate(decode)" if stream else "generate"
    assert outline(spans, OUTER) == f"{ROOT}(fetch encode {inner})"
    assert is_nested(spans)
    assert named(spans, "generate").attributes == {"embferry.worker": "http://lang"}


async def test_instances_get_the_span_of_their_call_and_nothing_else_of_the_client(spans: list[Span]) -> None:
    encoder, language = two()
    async with routed(encoder, language) as router:
        await router.ask(request(picture(), text()), traceparent=PARENT, tracestate="vendor=x", baggage="user=ann")
    for stub, name in ((encoder, "encode"), (language, "generate")):
        (got,) = stub.headers
        assert got["traceparent"] == named(spans, name).context.parent
        assert got["tracestate"] == "vendor=x"
        assert "baggage" not in got


async def test_each_picture_has_a_call_of_its_own(spans: list[Span]) -> None:
    encoder, language = two()
    async with routed(encoder, language) as router:
        await router.ask(request(picture(b"one"), picture(b"two"), text()))
    assert outline(spans) == f"{ROOT}(fetch encode encode generate)"
    calls = {span.context.parent for span in spans if span.name == "encode"}
    assert {got["traceparent"] for got in encoder.headers} == calls


@pytest.mark.parametrize("what", [what for what, headers in MALFORMED.items() if len(headers) == 1])
async def test_malformed_headers_count_as_none(spans: list[Span], what: str) -> None:
    encoder, language = two()
    ((name, value),) = MALFORMED[what]
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture(), text()), **{name: value})
    assert answer.status == 200
    assert outline(spans) == f"{ROOT}(fetch encode generate)"
    assert all("tracestate" not in got for got in language.headers)


async def test_without_traces_instances_get_no_headers() -> None:
    encoder, language = two()
    async with routed(encoder, language) as router:
        await router.ask(request(picture(), text()), traceparent=PARENT, tracestate="vendor=x")
    for stub in (encoder, language):
        assert not {"traceparent", "tracestate"} & set(stub.headers[0])


async def test_a_path_that_is_passed_on_has_a_tree_too(spans: list[Span]) -> None:
    encoder, language = two()
    async with routed(encoder, language) as router:
        answer = await router.call({"model": "tiny", "prompt": "x"}, "/tokenize", traceparent=PARENT).answer()
    assert answer.status == 200
    assert outline(spans, OUTER) == "POST /tokenize(fetch generate)"
    (got,) = language.headers
    assert got["traceparent"] == named(spans, "generate").context.parent


async def test_stages_have_names_of_their_own(spans: list[Span]) -> None:
    encoders, (prefill,), (decode,) = stages()
    async with routed(*encoders, prefill, decode) as router:
        answer = await router.ask(request(picture(), text()))
    assert answer.status == 200
    assert outline(spans) == f"{ROOT}(fetch encode prefill decode)"


async def test_an_encoder_that_fails_is_beside_the_one_that_does_not(spans: list[Span]) -> None:
    encoders, language = encoder_stubs(2), Stub("lang", "language")
    for encoder in encoders:
        encoder.behaviours = [lost()]
    async with routed(*encoders, language) as router:
        answer = await router.ask(request(picture(), text()))
        assert answer.status in (200, 503)
    errors = [span.error for span in spans if span.name == "encode"]
    assert errors[0] == "ReadError"
    assert any(name == "encode_retry" for _, name, _ in named(spans, ROOT).events)


async def test_an_instance_that_refuses_marks_its_call_and_the_root(spans: list[Span]) -> None:
    encoder, language = two()
    language.behaviours = [refused(400)]
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture(), text()))
    assert answer.status == 400
    assert outline(spans) == f"{ROOT}:instance(fetch encode generate:instance)"


async def test_a_stream_that_breaks_off_marks_its_call_and_the_root(spans: list[Span]) -> None:
    encoder, language = two()
    language.behaviours = [streamed(ROLE, *events_of("a red circle")[1:3], BREAK)]
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture(), text(), stream=True))
    assert b"worker_failed" in answer.body
    root, call = named(spans, ROOT), named(spans, "generate")
    assert (root.error, call.error) == ("worker_failed", "worker_failed")


async def test_a_failover_is_an_event_and_its_encode_a_call_of_the_same_tree(spans: list[Span]) -> None:
    encoders, language = encoder_stubs(2), Stub("lang", "language")
    language.behaviours = [held]
    async with routed(*encoders, language) as router:
        call = router.call(request(picture(), text()), traceparent=PARENT)
        await until(lambda: language.requests)
        ((_, entry),) = language.requests[0]["ec_transfer_params"].items()
        first = entry["embferry"]
        told = {"code": "peer_gone", "message": "killed", "endpoint": first["endpoint"]}
        assert (await router.post(f"/ec/failovers/{first['failover_token']}", told)).status == 200
        language.release.set()
        assert (await call.answer()).status == 200
    assert outline(spans, OUTER) == f"{ROOT}(fetch encode generate encode)"
    root = named(spans, ROOT)
    assert [name for _, name, _ in root.events if name == "failover"] == ["failover"]
    headers = [got for encoder in encoders for got in encoder.headers]
    assert {got["traceparent"] for got in headers} == {s.context.parent for s in spans if s.name == "encode"}


async def test_a_client_that_leaves_is_no_error(spans: list[Span]) -> None:
    encoder, language = two()
    language.behaviours = [held]
    async with routed(encoder, language) as router:
        call = router.call(request(picture(), text()))
        await until(lambda: language.holding)
        call.leave()
        await asyncio.wait({call.task})
    assert outline(spans) == f"{ROOT}(fetch encode generate)"


async def test_spans_hold_nothing_that_the_client_or_the_model_has_said(spans: list[Span]) -> None:
    encoder, language = two()

    async def told(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(500, text="hunter2: a secret question")

    language.behaviours = [told, told, told, told]
    async with routed(encoder, language) as router:
        await router.ask(request(picture(), text("a secret question"), user="ann"), authorization="Bearer tok-key")
    seen = json.dumps([[span.name, span.attributes, span.events, span.error] for span in spans])
    for secret in ("secret question", "hunter2", "tok-key", '"ann"', "base64"):
        assert secret not in seen
