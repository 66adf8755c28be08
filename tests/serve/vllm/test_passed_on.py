"""Paths that go to an instance as they are, and fields that vLLM does not know."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from embferry.serve.openai.ignored import HEADER
from embferry.serve.vllm.fields import KNOWN, ignored_fields
from embferry.serve.vllm.passed_on import PATHS
from tests.serve.vllm.stubs import BREAK, Stub, answered, picture, request, routed, streamed, text

pytestmark = pytest.mark.asyncio

EVENTS = (b"event: response.created\ndata: {}\n\n", b"event: response.completed\ndata: {}\n\n")


def replied(status: int = 200, body: Any = None) -> Any:
    async def behave(stub: Stub, asked: dict[str, Any]) -> httpx.Response:
        return httpx.Response(status, json={"from": stub.host} if body is None else body)

    return behave


@pytest.mark.parametrize("path", PATHS)
async def test_a_request_goes_to_an_instance_that_answers(path: str) -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language", behaviours=[replied()])
    async with routed(encoder, language) as router:
        response = await router.post(path, {"model": "tiny", "prompt": "x", "input": "x", "tokens": [1]})
    assert (response.status, response.json()) == (200, {"from": "l"})
    assert language.requests == [{"model": "tiny", "prompt": "x", "input": "x", "tokens": [1]}]
    assert not encoder.requests


async def test_a_stream_is_passed_on_piece_by_piece() -> None:
    language = Stub("l", "language", behaviours=[streamed(*EVENTS)])
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.post("/v1/responses", {"model": "tiny", "input": "x", "stream": True})
    assert response.status == 200
    assert response.body == b"".join(EVENTS)


async def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    language = Stub("l", "language", behaviours=[streamed(EVENTS[0], BREAK)])
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.post("/v1/completions", {"model": "tiny", "prompt": "x", "stream": True})
    assert response.status == 200
    assert b'"worker_failed"' in response.body


async def test_another_instance_is_asked_where_one_is_busy_or_gone() -> None:
    first = Stub("l", "language", behaviours=[replied(503)])
    second = Stub("m", "language", behaviours=[replied()])
    async with routed(Stub("e", "encode"), first, second) as router:
        assert (await router.post("/tokenize", {"prompt": "x"})).json() == {"from": "m"}
        second.up = False
        first.behaviours = [replied()]
        assert (await router.post("/tokenize", {"prompt": "x"})).json() == {"from": "l"}


@pytest.mark.parametrize(("status", "code"), [(422, 422), (500, 502), (503, 503)])
async def test_what_an_instance_refuses(status: int, code: int) -> None:
    language = Stub("l", "language", behaviours=[replied(status, {"error": {"message": "no"}})])
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.post("/v1/completions", {"prompt": "x"})
    assert response.status == code
    assert "no" in response.json()["error"]["message"]


FILE = "http://169.254.169.254/latest"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": FILE}]}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": FILE}]}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "mcp", "server_url": FILE}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"video_url": {"url": FILE}}]}]}),
        ("/v1/completions", {"prompt_embeds": "AAAA"}),
        ("/v1/completions", {"prompt": "x", "ec_transfer_params": {}}),
    ],
)
async def test_a_file_or_an_address_does_not_get_past_the_router(path: str, fields: dict[str, Any]) -> None:
    language = Stub("l", "language")
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.post(path, fields)
    assert (response.status, response.json()["error"]["code"]) == (400, "unsupported_value")
    assert not language.requests


async def test_a_long_text_is_refused_before_an_instance_gets_it() -> None:
    language = Stub("l", "language")
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.post("/tokenize", {"prompt": "x" * 10_000_000})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert not language.requests


@pytest.mark.parametrize("asked", [text(), picture(b"x")], ids=["text", "picture"])
@pytest.mark.parametrize("stream", [False, True])
async def test_fields_that_vllm_does_not_know_are_named(asked: dict[str, Any], stream: bool) -> None:
    language = Stub("l", "language", behaviours=[answered()] * 2)
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.ask(request(asked, temprature=1, guided_grammar="x", top_k=5, stream=stream))
        assert response.headers[HEADER.lower()] == "temprature, guided_grammar"
        assert HEADER.lower() not in (await router.ask(request(asked, top_k=5))).headers
    assert language.requests[0]["temprature"] == 1


@pytest.mark.parametrize("asked", [text(), picture(b"x")], ids=["text", "picture"])
async def test_a_missing_model_is_one_that_is_served(asked: dict[str, Any]) -> None:
    body = {name: value for name, value in request(asked).items() if name != "model"}
    history = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": ["seen", asked]}]
    async with routed(Stub("e", "encode"), language := Stub("l", "language")) as router:
        assert (await router.ask(body | {"messages": [*body["messages"], *history]})).status == 200
    assert "model" not in language.requests[0]
    assert language.requests[0]["messages"][-2] == history[0]
    assert language.requests[0]["messages"][-1]["content"][0] == "seen"


async def test_fields_that_ask_for_nothing_are_not_named() -> None:
    assert not ignored_fields({"store": False, "best_of": 1, "metadata": {"a": 1}, "x": None, "service_tier": "auto"})
    assert str(ignored_fields({"store": True, "best_of": 2, "guided_json": {}})) == "store, best_of, guided_json"


@pytest.mark.vllm
async def test_the_fields_are_those_of_the_installed_vllm() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    assert frozenset(ChatCompletionRequest.model_fields) == KNOWN
