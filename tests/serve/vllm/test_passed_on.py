"""Paths that go to an instance as they are, and fields that vLLM does not know."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import pytest

from embferry.serve.openai.ignored import HEADER
from embferry.serve.vllm import fields
from embferry.serve.vllm.fields import ignored_fields
from embferry.serve.vllm.passed_on import PATHS
from embferry.serve.vllm.responses import RESPONSES
from tests.serve.vllm.losses import ends
from tests.serve.vllm.stubs import (
    BREAK,
    Network,
    Stub,
    answered,
    events_of,
    picture,
    request,
    routed,
    streamed,
    text,
)

pytestmark = pytest.mark.asyncio

EVENTS = (b"event: response.created\ndata: {}\n\n", b"event: response.completed\ndata: {}\n\n")


def replied(status: int = 200, body: Any = None) -> Any:
    async def behave(stub: Stub, asked: dict[str, Any]) -> httpx.Response:
        return httpx.Response(status, json={"from": stub.host} if body is None else body)

    return behave


@pytest.mark.parametrize("path", [*PATHS, RESPONSES])
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


@pytest.mark.parametrize("path", [*PATHS, RESPONSES])
async def test_a_lost_instance_is_replaced_once(path: str) -> None:
    languages = [Stub(f"l{number}", "language", behaviours=[ends]) for number in range(4)]
    body = {"model": "tiny", "prompt": "x", "input": "x", "tokens": [1]}
    async with routed(Stub("e", "encode"), *languages) as router:
        refused = await router.post(path, body)
        assert (refused.status, refused.error["code"]) == (502, "worker_failed")
        assert "before that" in refused.error["message"]
        assert [language.up for language in languages].count(False) == 2
        for language in languages:
            language.behaviours = [replied()] * 2
        next(language for language in languages if language.up).behaviours = [ends]
        assert (await router.post(path, body)).status == 200


@pytest.mark.parametrize(("status", "code"), [(422, 422), (500, 502), (503, 503)])
async def test_what_an_instance_refuses(status: int, code: int) -> None:
    language = Stub("l", "language", behaviours=[replied(status, {"error": {"message": "no"}})])
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.post("/v1/completions", {"prompt": "x"})
    assert response.status == code
    assert "no" in response.json()["error"]["message"]


FILE = "http://169.254.169.254/latest"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": FILE}]}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "mcp", "server_url": FILE}]}),
        (
            "/v1/responses",
            {"input": "x", "previous_input_messages": [{"role": "user", "content": [{"image_url": FILE}]}]},
        ),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"video_url": {"url": FILE}}]}]}),
        ("/v1/completions", {"prompt_embeds": "AAAA"}),
        ("/v1/completions", {"prompt": "x", "ec_transfer_params": {}}),
    ],
)
async def test_a_file_or_an_address_does_not_get_past_the_router(path: str, asked: dict[str, Any]) -> None:
    language = Stub("l", "language")
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.post(path, asked)
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
    quiet = [{"type": "image_url", "image_url": {"url": "x", "detail": "auto"}, "uuid": None}, {"text": "x"}, "x"]
    assert not ignored_fields({"messages": [{"role": "user", "content": quiet}, "x", None, {"content": 5}]})


@pytest.mark.parametrize(
    ("path", "asked", "named"),
    [
        ("/v1/completions", {"prompt": "x", "zzz": 1, "n": 1, "best_of": 2}, "zzz, best_of"),
        ("/v1/completions", {"prompt": "x", "guided_regex": "a", "top_logprobs": 1}, "guided_regex, top_logprobs"),
        ("/v1/responses", {"input": "x", "temprature": 1, "max_tokens": 5, "store": True}, "temprature, max_tokens"),
        ("/tokenize", {"prompt": "x", "zzz": 1, "messages_": []}, "zzz, messages_"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x", "zzz": 1}], "y": 1}, "y, messages[0].zzz"),
        ("/detokenize", {"tokens": [1], "skip_special_tokens": True}, "skip_special_tokens"),
        ("/v1/completions", {"prompt": "x", "stream_options": {"include_usage": True, "zzz": 1}}, "stream_options.zzz"),
    ],
)
@pytest.mark.parametrize("status", [200, 422])
async def test_fields_that_vllm_does_not_know_are_named_at_every_path(
    path: str, asked: dict[str, Any], named: str, status: int
) -> None:
    language = Stub("l", "language", behaviours=[replied(status)])
    async with routed(Stub("e", "encode"), language) as router:
        response = await router.post(path, asked)
    assert (response.status, response.headers[HEADER.lower()]) == (status, named)
    assert language.requests == [asked]


MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "of a message": ({"role": "user", "content": "x", "zzz": 1, "tool_calls": [1]}, "zzz, tool_calls"),
    "of the assistant": ({"role": "assistant", "reasoning": "y", "function_call": {"a": 1}}, "function_call"),
    "of a tool": ({"role": "tool", "content": "x", "tool_call_id": "1", "reasoning": "x"}, "reasoning"),
    "detail": ({"content": [{"image_url": {"url": "u", "detail": "high"}}]}, "content[0].image_url.detail"),
    "detail beside": ({"content": [{"image_url": "u", "detail": "low"}]}, "content[0].detail"),
    "uuid": ({"content": [{"type": "text", "text": "x", "uuid": "a"}]}, "content[0].uuid"),
    "fps": ({"content": [{"type": "video_url", "video_url": {"url": "u", "fps": 2}, "fps": 1}]},
            "content[0].fps, content[0].video_url.fps"),
    "a text beside a picture": ({"content": [{"image_url": "u", "text": "lost"}]}, "content[0].text"),
    "of a sound": ({"content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav", "zzz": 1}}]},
                   "content[0].input_audio.zzz"),
    "of a text": ({"content": [{"type": "text", "text": "x", "cache_control": {"a": 1}}]}, "content[0].cache_control"),
}  # fmt: skip


@pytest.mark.parametrize("what", MESSAGES)
async def test_fields_within_messages_that_nothing_reads_are_named(what: str) -> None:
    message, named = MESSAGES[what]
    places = ", ".join(f"messages[1].{one}" for one in named.split(", "))
    assert str(ignored_fields({"messages": [{"role": "user", "content": "x"}, message]})) == places


async def test_fields_within_the_input_of_a_response_that_are_not_read_are_named() -> None:
    said = {"type": "output_text", "text": "a cat", "annotations": [{"type": "url_citation"}]}
    items = [
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [said]},
        {"role": "user", "bar": 2, "content": [{"type": "input_text", "text": "x", "foo": 1}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:,", "detail": "auto", "uuid": "q"}]},
        {"type": "function_call_output", "call_id": "1", "output": "5", "any": 1},
        "x",
    ]
    named = ignored_fields({"model": "m", "input": items}, "/v1/responses")
    assert str(named) == "input[1].bar, input[1].content[0].foo, input[2].content[0].uuid"


async def test_fields_within_parts_are_named_to_the_client() -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    async with routed(encoder, language) as router:
        response = await router.ask(request(picture(b"x", uuid="theirs", zzz=1), text()))
    assert response.headers[HEADER.lower()] == "messages[0].content[0].zzz"


MODELS = """
import json
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
models = (
    ChatCompletionRequest, CompletionRequest, ResponsesRequest, TokenizeCompletionRequest, TokenizeChatRequest,
    DetokenizeRequest, StreamOptions,
)
print()
print(json.dumps([list(model.model_fields) for model in models]))
"""


@pytest.mark.vllm_http
async def test_the_fields_are_those_of_the_installed_vllm() -> None:
    read = await asyncio.create_subprocess_exec(sys.executable, "-c", MODELS, stdout=asyncio.subprocess.PIPE)
    output, _ = await read.communicate()
    assert [frozenset(names) for names in json.loads(output.splitlines()[-1])] == [
        fields.CHAT_FIELDS,
        fields.TEXT_FIELDS,
        fields.RESPONSES_FIELDS,
        fields.TOKENIZE_FIELDS,
        fields.TOKENIZE_CHAT_FIELDS,
        fields.DETOKENIZE_FIELDS,
        fields.STREAM_OPTIONS,
    ]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "uuid": "abc"}]}]}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "uuid": "abc"}]}]},
        ),
        ("/v1/responses", {"input": [{"type": "function_call_output", "output": [{"text": "x", "uuid": "abc"}]}]}),
    ],
)
async def test_a_client_s_name_for_a_part_is_removed(path: str, asked: dict[str, Any]) -> None:
    language = Stub("l", "language", behaviours=[replied()])
    async with routed(Stub("e", "encode"), language) as router:
        assert (await router.post(path, asked)).status == 200
    assert json.dumps(language.requests[0]) == json.dumps(asked).replace(', "uuid": "abc"', "")


async def test_a_field_that_is_called_like_that_stays() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": {"uuid": "abc"}}
    asked = {"input": [call], "tools": [{"type": "function", "parameters": {"properties": {"uuid": {}}}}]}
    language = Stub("l", "language", behaviours=[replied()])
    async with routed(Stub("e", "encode"), language) as router:
        assert (await router.post("/v1/responses", asked)).status == 200
    assert language.requests == [asked]


@pytest.mark.parametrize("reason", ["abort", "error"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_an_instance_gives_up_is_an_error(reason: str, stream: bool) -> None:
    """A server of vLLM that is told to end ends its answers as if they were complete."""
    events = events_of("a red circle", reason)
    whole = {"choices": [{"text": "a red", "finish_reason": reason}]}
    for path in ("/v1/completions", "/v1/chat/completions"):
        if path == "/v1/chat/completions" and not stream:
            continue  # asked again
        language = Stub("l", "language", behaviours=[streamed(*events) if stream else replied(200, whole)])
        async with routed(Stub("e", "encode"), language) as router:
            response = await router.post(path, request(text(), prompt="x", stream=stream))
        assert response.status == (200 if stream else 502)
        assert b'"worker_failed"' in response.body
        assert b"[DONE]" not in response.body
        assert b'"finish_reason": "' not in response.body


async def test_a_text_that_speaks_of_a_reason_is_none() -> None:
    said = '"finish_reason":"abort"'
    language = Stub("l", "language", behaviours=[streamed(*events_of(said)), answered(said)])
    async with routed(Stub("e", "encode"), language) as router:
        assert (await router.ask(request(text(), stream=True))).body.rstrip().endswith(b"[DONE]")
        assert (await router.post("/v1/completions", {"prompt": "x"})).status == 200


async def test_a_missing_model_has_the_limit_of_those_that_are_served() -> None:
    described = {"id": "tiny", "object": "model", "max_model_len": 100}
    language = Stub("l", "language", behaviours=[replied()])
    async with routed(
        Stub("e", "encode"), language, network=Described(described, Stub("e", "encode"), language)
    ) as router:
        for path in ("/tokenize", "/v1/completions"):
            refused = await router.post(path, {"prompt": "x" * 2000})
            assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
        assert (await router.post("/tokenize", {"prompt": "x" * 200})).status == 200


class Described(Network):
    """Instances whose list of models has this one."""

    def __init__(self, model: dict[str, Any], *stubs: Stub) -> None:
        super().__init__(*stubs)
        self._model = model

    async def handle_async_request(self, asked: httpx.Request) -> httpx.Response:
        answer = await super().handle_async_request(asked)
        return httpx.Response(200, json={"data": [self._model]}) if asked.url.path == "/v1/models" else answer
