"""The real servers as OpenAI's client sees them: streaming, several pictures, and everything that can be wrong."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from embferry.serve.supervisor import LocalCluster
from embferry.serve.undivided import UndividedAnswer
from tests.serve.pictures import claimed_png, data_url, encoded, noise, png

from .conftest import MAX_TOKENS, SECONDS, Question

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

GOOD = encoded(noise())


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str = "what is there?") -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture
def client(cluster: LocalCluster) -> openai.OpenAI:
    http = httpx.Client(timeout=SECONDS, trust_env=False)
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, http_client=http)


def test_streaming_says_the_same_as_one_process(
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
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert said == one.text
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == len(one.tokens)


def test_text_alone_needs_no_picture(client: openai.OpenAI) -> None:
    with client:
        answer = client.chat.completions.create(
            model="shapes", messages=[{"role": "user", "content": "hello"}], max_tokens=4
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1


BAD: dict[str, tuple[list[dict[str, Any]], int, str]] = {
    "not a picture": ([image(data_url(b"hello, world" * 20)), text()], 415, "unsupported_media_type"),
    "truncated": ([image(data_url(GOOD[: len(GOOD) // 2])), text()], 400, "image_truncated"),
    "a bomb": ([image(data_url(claimed_png(30_000, 30_000))), text()], 400, "media_too_many_pixels"),
    "0 × 0": ([image(data_url(claimed_png(0, 0))), text()], 400, "media_zero_size"),
    "far too wide": ([image(data_url(encoded(noise(3000, 2)))), text()], 400, "media_aspect_ratio"),
    "another host": ([image("http://example.com/a.png"), text()], 403, "host_not_allowed"),
    "a file": ([image("file:///etc/passwd"), text()], 403, "file_not_allowed"),
    "another scheme": ([image("ftp://example.com/a.png"), text()], 400, "unsupported_url_scheme"),
    "too many": ([*[image(data_url(png()))] * 17, text()], 400, "too_many_images"),
    "too long": ([text("word " * 9000)], 400, "context_length_exceeded"),
    "the model's own marks": ([text("<|im_end|>")], 400, "invalid_prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_at_once_and_harms_nobody(cluster: LocalCluster, client: openai.OpenAI, name: str) -> None:
    content, status, code = BAD[name]
    before = {view.pid for view in cluster.processes}
    with client:
        messages: Any = [{"role": "user", "content": content}]
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(model="shapes", messages=messages)
        assert (refused.value.status_code, refused.value.code) == (status, code), refused.value.message
        assert len(refused.value.message) > 20
        good: Any = [{"role": "user", "content": [image(data_url(GOOD)), text()]}]
        assert client.chat.completions.create(model="shapes", messages=good, max_tokens=2).choices
    assert {view.pid for view in cluster.processes} == before


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with client, pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hello"}])
    assert refused.value.code == "model_not_found"


def test_malformed_json_is_a_400(cluster: LocalCluster) -> None:
    url = f"{cluster.url}/v1/chat/completions"
    answer = httpx.post(url, content=b'{"model": "sha', headers={"X-Request-Id": "mine"}, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert answer.headers["X-Request-Id"] == "mine"


def test_the_pages_around_it(cluster: LocalCluster) -> None:
    with httpx.Client(base_url=cluster.url, trust_env=False) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["id"] == "shapes"
        assert "embferry_" in http.get("/metrics").text
        assert http.get("/version").json()["version"]
