"""The paths that clients may post to, beside ``/v1/chat/completions``; and what all of them share."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import httpx
import openai
import pytest

from embferry.serve.byte_budget import Hold
from embferry.serve.openai.ignored import HEADER
from embferry.serve.router.chat import LOGPROB_BYTES
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import END, Deployment, tokens
from tests.serve.inside import Inside

pytestmark = pytest.mark.asyncio

CHAT = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}


def asked(inside: Deployment) -> dict[str, Any]:
    """Returns the last request that the language worker got."""
    return dict(inside.fakes["language0"].requests[-1])


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Returns the events of a stream, without the last mark."""
    lines = [line for block in response.text.split("\n\n") for line in block.split("\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# Chat


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}, {"model": "shapes"}])
async def test_a_missing_model_is_the_one_that_is_served(inside: Inside, model: dict[str, Any]) -> None:
    response = await inside.post(CHAT, {"messages": user("?"), **model})
    assert (response.status_code, response.json()["model"]) == (200, "shapes")


async def test_a_history_with_tool_calls_reaches_the_language_worker(inside: Inside) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    history = [
        *user("look"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": ["seen:", PICTURE]},
    ]
    assert (await inside.post(CHAT, {"messages": history})).status_code == 200
    _, assistant, tool = asked(inside)["messages"]
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"at": "sky"}
    assert tool["parts"] == [{"type": "text", "text": "seen:"}, {"type": "image", "item": 0}]
    assert len(inside.fakes["encode0"].requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_fields_without_effect_are_named_in_the_response_and_the_log(
    inside: Inside, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    with caplog.at_level("INFO"):
        response = await inside.post(CHAT, {"messages": user("?"), "temprature": 0.5, "stream": stream})
    assert response.headers[HEADER] == "temprature"
    (line,) = [record for record in caplog.records if getattr(record, "ignored", None)]
    assert line.ignored == "temprature"
    assert HEADER not in (await inside.post(CHAT, {"messages": user("?")})).headers


async def test_a_room_is_a_text(inside: Inside) -> None:
    response = await inside.post(CHAT, {"messages": user(PICTURE, "?")})
    assert response.json()["embferry"]["room"] == str(asked(inside)["room"])


CHOICES: list[Any] = [
    *({**token, "choice": n} for token in tokens("a", "b") for n in (0, 1)),
    {**END, "finish_reasons": ["stop", "length"]},
]


async def test_several_choices(inside: Inside) -> None:
    inside.fakes["language0"].script = CHOICES
    whole = (await inside.post(CHAT, {"messages": user("?"), "n": 2})).json()
    assert [(one["index"], one["message"]["content"], one["finish_reason"]) for one in whole["choices"]] == [
        (0, "ab", "stop"),
        (1, "ab", "length"),
    ]
    assert whole["embferry"]["tokens"] == [[100, 101], [100, 101]]
    told = events(await inside.post(CHAT, {"messages": user("?"), "n": 2, "stream": True}))
    choices = [one["choices"][0] for one in told]
    assert [one["index"] for one in choices] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [one["finish_reason"] for one in choices[-2:]] == ["stop", "length"]
    assert ["embferry" in one for one in told] == [False] * 7 + [True]


TOP = [["a", -0.5], ["é", -1.5]]
LOGPROBS: list[Any] = [{**token, "piece": token["text"], "logprob": -0.5, "top": TOP} for token in tokens("a", "")] + [
    END
]


async def test_log_probabilities(inside: Inside) -> None:
    inside.fakes["language0"].script = LOGPROBS
    body = {"messages": user("?"), "logprobs": True, "top_logprobs": 2}
    content = (await inside.post(CHAT, body)).json()["choices"][0]["logprobs"]["content"]
    entry = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert content[0] == entry | {"top_logprobs": [entry, {"token": "é", "logprob": -1.5, "bytes": [195, 169]}]}
    assert asked(inside)["sampling"]["logprobs"] == 2
    streamed = events(await inside.post(CHAT, body | {"stream": True}))
    assert [one["choices"][0]["logprobs"]["content"][0] for one in streamed[1:3]] == content


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_that_are_kept_count_as_held(
    inside: Inside, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    inside.fakes["language0"].script = LOGPROBS
    added: list[int] = []
    monkeypatch.setattr(Hold, "add", lambda hold, nbytes: added.append(nbytes))
    await inside.post(CHAT, {"messages": user("?"), "logprobs": True, "top_logprobs": 2, "stream": stream})
    assert sum(added) == (0 if stream else 2 * 3 * LOGPROB_BYTES)


async def test_the_form_of_an_answer_reaches_the_language_worker(inside: Inside) -> None:
    await inside.post(CHAT, {"messages": user("?"), "structured_outputs": {"choice": ["a", "b"]}})
    assert asked(inside)["sampling"]["constraint"] == {"choice": ["a", "b"]}


async def test_the_end_of_the_prompt_reaches_the_language_worker(inside: Inside) -> None:
    messages = [*user("?"), {"role": "assistant", "content": "It is"}]
    await inside.post(CHAT, {"messages": messages, "continue_final_message": True, "add_generation_prompt": False})
    assert asked(inside)["continues"] is True
    await inside.post(CHAT, {"messages": messages, "add_generation_prompt": False})
    assert asked(inside)["opens"] is False


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/tokenize"])
async def test_texts_are_bounded_to_the_character(inside: Inside, path: str) -> None:
    most = inside.settings.language.prompt_characters
    for count, status in ((most, 200), (most + 1, 400)):
        text = "x" * count
        body = {"messages": user(text)} if path == CHAT else {"prompt": text, "input": text}
        if path == "/v1/responses":
            del body["prompt"]
        assert (await inside.post(path, body)).status_code == status


# Completions


async def test_a_prompt_without_a_chat_template(inside: Inside) -> None:
    response = await inside.post("/v1/completions", {"prompt": "once upon", "max_tokens": 5})
    whole = response.json()
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", "a red circle")
    assert whole["usage"]["total_tokens"] == 73
    assert asked(inside)["prompt"] == "once upon"
    assert "messages" not in asked(inside)
    await inside.post("/v1/completions", {"prompt": [1, 2, 3]})
    assert (asked(inside)["prompt"], asked(inside)["sampling"]["max_tokens"]) == ([1, 2, 3], 16)


async def test_a_stream_of_completions(inside: Inside) -> None:
    inside.fakes["language0"].script = LOGPROBS
    body = {"prompt": "x", "stream": True, "logprobs": 2, "stream_options": {"include_usage": True}}
    response = await inside.post("/v1/completions", body)
    told = events(response)
    assert response.text.endswith("data: [DONE]\n\n")
    assert told[0]["choices"][0]["logprobs"] == {
        "tokens": ["a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"a": -0.5, "é": -1.5}],
        "text_offset": [0],
    }
    assert told[1]["choices"][0]["logprobs"]["text_offset"] == [1]
    assert told[-2]["choices"][0]["finish_reason"] == "stop"
    assert told[-1]["usage"]["prompt_tokens"] == 70


# Responses


async def test_a_conversation_as_input(inside: Inside) -> None:
    picture = {"type": "input_image", "image_url": PICTURE["image_url"]["url"], "detail": "auto"}  # type: ignore[index]
    body = {
        "instructions": "be brief",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "what?"}, picture]},
            {
                "type": "message",
                "id": "m",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "this"}],
            },
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "done"},
        ],
        "max_output_tokens": 9,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "integer"}}},
    }
    response = await inside.post("/v1/responses", body)
    whole = response.json()
    assert (whole["object"], whole["status"], whole["output"][0]["content"][0]["text"]) == (
        "response",
        "completed",
        "a red circle",
    )
    assert whole["usage"] | {"input_tokens": 70, "output_tokens": 3} == whole["usage"]
    assert HEADER not in response.headers
    request = asked(inside)
    assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "assistant", "tool"]
    assert request["sampling"]["max_tokens"] == 9
    assert request["sampling"]["constraint"] == {"json": {"type": "integer"}}


async def test_the_form_of_an_answer_by_another_paths_name_is_named(inside: Inside) -> None:
    response = await inside.post("/v1/responses", {"input": "?", "response_format": {"type": "json_object"}})
    assert response.headers[HEADER] == "response_format"


async def test_a_stream_of_a_response_is_read_by_the_client_library(inside: Inside) -> None:
    async with (
        inside.asking() as http,
        openai.AsyncOpenAI(api_key="x", base_url="http://router/v1", http_client=http) as client,
    ):
        stream = await client.responses.create(model="shapes", input="?", stream=True)
        told = [event async for event in stream]
        whole = await client.responses.create(model="shapes", input="?")
    assert "".join(one.delta for one in told if one.type == "response.output_text.delta") == "a red circle"
    assert [one.sequence_number for one in told] == list(range(len(told)))
    assert (told[0].type, told[-1].type) == ("response.created", "response.completed")
    assert told[-1].response.output_text == whole.output_text == "a red circle"


async def test_a_response_that_is_cut_is_incomplete(inside: Inside) -> None:
    inside.fakes["language0"].script = [*tokens("a"), {**END, "finish_reason": "length"}]
    whole = (await inside.post("/v1/responses", {"input": "?"})).json()
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
    ],
)
async def test_what_a_response_cannot_have_is_refused(inside: Inside, fields: dict[str, Any], param: str) -> None:
    response = await inside.post("/v1/responses", {"input": "?", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# All paths


@pytest.mark.parametrize("inside", [{"api_key": "secret"}], indirect=True)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/tokenize", "/detokenize"])
async def test_every_path_for_clients_needs_the_api_key(inside: Inside, path: str) -> None:
    assert (await inside.post(path, {})).status_code == 401
    assert (await inside.post(path, {}, headers={"authorization": "Bearer secret"})).status_code == 400


async def test_another_path_is_told_what_there_is(inside: Inside) -> None:
    response = await inside.post("/v1/embeddings", {})
    message = response.json()["error"]["message"]
    assert response.status_code == 404
    for path in ("POST /v1/chat/completions", "POST /v1/responses", "GET /v1/models/NAME", "POST /tokenize"):
        assert path in message
    assert "/ec/" not in message


@pytest.mark.parametrize("inside", [{"cors_origins": ("https://page.example",), "api_key": "k"}], indirect=True)
async def test_a_web_page_may_ask_if_its_origin_is_listed(inside: Inside) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    async with inside.asking() as client:
        for origin, is_listed in (("https://page.example", True), ("https://other.example", False)):
            preflight = await client.options(CHAT, headers={"origin": origin, **asks})
            assert (preflight.headers.get("access-control-allow-origin") == origin) == is_listed
            refused = await client.post(CHAT, json={}, headers={"origin": origin})
            assert (refused.headers.get("access-control-allow-origin") == origin) == is_listed
            assert refused.status_code == 401
            assert HEADER.lower() in preflight.headers.get("access-control-expose-headers", HEADER.lower()).lower()
        assert (await client.options(CHAT, headers={"origin": "https://page.example", **asks})).status_code == 200


async def test_without_the_setting_no_web_page_may_ask(inside: Inside) -> None:
    response = await inside.post(CHAT, {"messages": user("?")}, headers={"origin": "https://page.example"})
    assert "access-control-allow-origin" not in response.headers


BODY = json.dumps({"messages": user("?")}).encode()


def packed(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP"])
async def test_a_body_may_be_packed(inside: Inside, coding: str) -> None:
    async with inside.asking() as client:
        response = await client.post(CHAT, content=packed(BODY), headers={"content-encoding": coding})
        assert response.status_code == 200
        parts = packed(BODY[:9]) + packed(BODY[9:])
        response = await client.post(CHAT, content=parts, headers={"content-encoding": coding})
        assert response.status_code == 200


@pytest.mark.parametrize("inside", [{"max_body_bytes": 100_000}], indirect=True)
@pytest.mark.parametrize(
    ("coding", "content", "code", "status"),
    [
        ("gzip", packed(b" " * 100_001), "body_too_large", 413),
        ("gzip", b"no gzip", "invalid_encoding", 400),
        ("gzip", packed(BODY)[:-9], "invalid_encoding", 400),
        ("gzip", packed(BODY) + b"rest", "invalid_encoding", 400),
        ("gzip", packed(b"") * 2000, "invalid_encoding", 400),
        ("gzip", b"", "invalid_encoding", 400),
        ("br", BODY, "unsupported_encoding", 415),
        ("gzip, gzip", packed(packed(BODY)), "unsupported_encoding", 415),
        ("deflate", zlib.compress(BODY), "unsupported_encoding", 415),
    ],
    ids=range(9),
)
async def test_packed_bodies_are_bounded(inside: Inside, coding: str, content: bytes, code: str, status: int) -> None:
    async with inside.asking() as client:
        response = await client.post(CHAT, content=content, headers={"content-encoding": coding})
    assert (response.json()["error"]["code"], response.status_code) == (code, status)
    assert not inside.fakes["language0"].requests


UNFIT = (503, {"error": {"message": "it encodes nothing", "code": "worker_unfit", "status": 503, "retryable": True}})


async def test_a_worker_whose_encodes_all_fail_is_passed_over(inside: Inside) -> None:
    inside.workers.append(inside.entry("encode1", load=5))
    inside.fakes["encode0"].refusal = UNFIT
    async with inside.asking() as client:
        for _ in range(3):
            assert (await client.post(CHAT, json={"messages": user(PICTURE, "?")})).status_code == 200
        assert [len(inside.fakes[f"encode{n}"].requests) for n in (0, 1)] == [1, 3]
        inside.fakes["encode1"].refusal = UNFIT
        refused = await client.post(CHAT, json={"messages": user(PICTURE, "?")})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_unfit")
    assert refused.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("path", [f"{CHAT}/", "/v1/completions/", "/tokenize/", "/health/"])
async def test_a_slash_too_many_is_another_path_and_no_redirect(inside: Inside, path: str) -> None:
    async with inside.asking() as client:
        response = await client.post(path, headers={"host": "elsewhere.example"})
    assert (response.status_code, "location" in response.headers) == (404, False)
    assert f"POST {CHAT}" in response.json()["error"]["message"]
