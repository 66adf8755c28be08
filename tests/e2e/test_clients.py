"""The real servers with OpenAI's client: streaming, several pictures, and bad requests."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from embferry.serve.supervisor import LocalCluster
from embferry.serve.undivided import UndividedAnswer
from tests.serve.pictures import claimed_png, data_url, encoded, noise, png

from .conftest import MAX_TOKENS, REQUEST_TIMEOUT, Question

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

GOOD = encoded(noise())


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(words: str = "what is there?") -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture
def client(cluster: LocalCluster) -> openai.OpenAI:
    http = httpx.Client(timeout=REQUEST_TIMEOUT, trust_env=False)
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, http_client=http)


def test_a_streamed_answer_equals_that_of_one_process(
    client: openai.OpenAI, expected: list[tuple[Question, UndividedAnswer]]
) -> None:
    with client:
        for question, one in expected[:4]:
            chunks = list(
                client.chat.completions.create(
                    model="shapes",
                    messages=question.messages,
                    max_tokens=MAX_TOKENS,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == one.text
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == len(one.tokens)


def test_a_question_without_pictures_is_answered(client: openai.OpenAI) -> None:
    with client:
        answer = client.chat.completions.create(
            model="shapes", messages=[{"role": "user", "content": "hello"}], max_tokens=4
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1


BAD: dict[str, tuple[list[dict[str, Any]], int, str]] = {
    "not a picture": ([image(data_url(b"hello, world" * 20)), text_part()], 415, "unsupported_media_type"),
    "truncated": ([image(data_url(GOOD[: len(GOOD) // 2])), text_part()], 400, "image_truncated"),
    "a bomb": ([image(data_url(claimed_png(30_000, 30_000))), text_part()], 400, "media_too_many_pixels"),
    "0 × 0": ([image(data_url(claimed_png(0, 0))), text_part()], 400, "media_zero_size"),
    "far too wide": ([image(data_url(encoded(noise(3000, 2)))), text_part()], 400, "media_aspect_ratio"),
    "another host": ([image("http://example.com/a.png"), text_part()], 403, "host_not_allowed"),
    "a file": ([image("file:///etc/passwd"), text_part()], 403, "file_not_allowed"),
    "another scheme": ([image("ftp://example.com/a.png"), text_part()], 400, "unsupported_url_scheme"),
    "too many": ([*[image(data_url(png()))] * 17, text_part()], 400, "too_many_images"),
    "too long": ([text_part("word " * 9000)], 400, "context_length_exceeded"),
    "a special token": ([text_part("<|im_end|>")], 400, "invalid_prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_the_next_request_succeeds(
    cluster: LocalCluster, client: openai.OpenAI, name: str
) -> None:
    content, status, code = BAD[name]
    before = {view.pid for view in cluster.processes}
    with client:
        messages: Any = [{"role": "user", "content": content}]
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(model="shapes", messages=messages)
        assert (refused.value.status_code, refused.value.code) == (status, code), refused.value.message
        assert len(refused.value.message) > 20
        good: Any = [{"role": "user", "content": [image(data_url(GOOD)), text_part()]}]
        assert client.chat.completions.create(model="shapes", messages=good, max_tokens=2).choices
    assert {view.pid for view in cluster.processes} == before


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with client, pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hello"}])
    assert refused.value.code == "model_not_found"


def test_malformed_json_is_a_400(cluster: LocalCluster) -> None:
    url = f"{cluster.url}/v1/chat/completions"
    answer = httpx.post(
        url, content=b'{"model": "sha', headers={"X-Request-Id": "mine"}, timeout=REQUEST_TIMEOUT, trust_env=False
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert answer.headers["X-Request-Id"] == "mine"


def test_the_other_paths_respond(cluster: LocalCluster) -> None:
    with httpx.Client(base_url=cluster.url, timeout=REQUEST_TIMEOUT, trust_env=False) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["id"] == "shapes"
        assert "embferry_" in http.get("/metrics").text
        assert http.get("/version").json()["version"]


def test_what_people_ask_of_an_answer(client: openai.OpenAI) -> None:
    """Parameters, forms and paths, by OpenAI's client, before a real model."""
    messages: Any = [{"role": "user", "content": [image(data_url(GOOD)), text_part("how many circles are there?")]}]
    with client:
        create = client.chat.completions.create
        plain = create(model="shapes", messages=messages)
        told = create(model="shapes", messages=messages, n=2, logprobs=True, top_logprobs=3)
        assert [choice.message.content for choice in told.choices] == [plain.choices[0].message.content] * 2
        entries = told.choices[1].logprobs
        assert entries is not None
        assert entries.content is not None
        assert len(entries.content[0].top_logprobs) == 3
        chosen = create(
            model="shapes", messages=messages, extra_body={"structured_outputs": {"choice": ["ten", "two"]}}
        )
        assert chosen.choices[0].message.content in ("ten", "two")
        schema = {
            "type": "object",
            "properties": {"n": {"enum": [7]}},
            "required": ["n"],
            "additionalProperties": False,
        }
        form: Any = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
        formed = create(model="shapes", messages=messages, response_format=form, max_tokens=200)
        assert json.loads(formed.choices[0].message.content or "") == {"n": 7}
        answered = client.responses.create(model="shapes", input="hello", max_output_tokens=8)
        same = create(model="shapes", messages=[{"role": "user", "content": "hello"}], max_tokens=8)
        assert answered.output_text == same.choices[0].message.content
        prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        completed = client.completions.create(model="shapes", prompt=prompt, max_tokens=8)
        assert completed.choices[0].text == same.choices[0].message.content
        raw = create_raw(client, messages)
        assert raw.headers["embferry-ignored-fields"] == "temprature"


def create_raw(client: openai.OpenAI, messages: Any) -> Any:
    return client.chat.completions.with_raw_response.create(
        model="shapes", messages=messages, max_tokens=2, extra_body={"temprature": 1}
    )
