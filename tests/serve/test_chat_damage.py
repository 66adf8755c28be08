"""Messages between router, workers and clients that arrive damaged: asked again, and never a wrong answer."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import httpx
import openai
import pytest

from embferry.trust.digests import content_digest
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import ANSWER, DAMAGE, END, Deployment, tokens

pytestmark = pytest.mark.integration

QUESTION = user({"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}, "?")
BODY = {"model": "shapes", "messages": QUESTION}
REFUSED = {"error": {"message": "it does not match", "code": "body_damaged", "retryable": True}}


def metric(http: httpx.Client, name: str) -> float:
    (line,) = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_the_same_worker_is_asked_once_more(deployment: Deployment, http: httpx.Client) -> None:
    deployment.workers.append(deployment.entry("language1", load=5))
    deployment.wait(lambda: http.get("/ready").json()["workers"]["language"] == 2)
    deployment.fakes["language0"].scripts = [[*tokens("a "), DAMAGE]]
    answer = http.post("/v1/chat/completions", json=BODY)
    assert answer.json()["choices"][0]["message"]["content"] == "a red circle"
    rooms = [request["room"] for request in deployment.fakes["language0"].requests]
    assert len(set(rooms)) == 2  # the first attempt may still be at work in its room
    deployment.wait(lambda: deployment.fakes["language0"].aborted == rooms[:1])
    deployment.wait(lambda: deployment.fakes["encode0"].aborted == rooms[:1])
    assert deployment.fakes["language1"].requests == []
    assert metric(http, 'embferry_router_damaged_messages_total{role="language"}') == 1
    assert metric(http, "embferry_router_chat_second_attempts_total") == 1


def test_another_worker_is_asked_after_the_second_damage(deployment: Deployment, http: httpx.Client) -> None:
    deployment.workers.append(deployment.entry("language1", load=5))
    deployment.wait(lambda: http.get("/ready").json()["workers"]["language"] == 2)
    deployment.fakes["language0"].script = [DAMAGE]
    answer = http.post("/v1/chat/completions", json=BODY)
    assert answer.json()["choices"][0]["message"]["content"] == "a red circle"
    assert [len(deployment.fakes[name].requests) for name in ("language0", "language1")] == [2, 1]


def test_without_another_worker_the_error_names_the_network(deployment: Deployment, client: openai.OpenAI) -> None:
    deployment.fakes["language0"].script = [DAMAGE]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="shapes", messages=QUESTION)
    assert (caught.value.status_code, caught.value.code) == (502, "network_damage")
    assert "before that" in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "true"
    assert len(deployment.fakes["language0"].requests) == 2


@pytest.mark.parametrize("name", ["encode0", "language0"])
def test_a_worker_that_refuses_a_damaged_request_is_asked_once_more(
    deployment: Deployment, client: openai.OpenAI, name: str
) -> None:
    deployment.fakes[name].refusal = (400, REFUSED)
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="shapes", messages=QUESTION)
    assert (caught.value.status_code, caught.value.code) == (502, "network_damage")  # the client's body was right
    assert len(deployment.fakes[name].requests) == 2


def test_a_stream_that_has_begun_ends_with_an_error(deployment: Deployment, client: openai.OpenAI) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), DAMAGE]
    stream = client.chat.completions.create(model="shapes", messages=QUESTION, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "a "]
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert caught.value.code == "network_damage"
    assert len(deployment.fakes["language0"].requests) == 1


def test_a_text_with_any_line_separator_arrives(deployment: Deployment, http: httpx.Client) -> None:
    deployment.fakes["language0"].script = [*tokens("a\u2028b\x85c\r", "\n"), END]
    answer = http.post("/v1/chat/completions", json=BODY)
    assert answer.json()["choices"][0]["message"]["content"] == "a\u2028b\x85c\r\n"
    deployment.fakes["language0"].script = list(ANSWER)


# The client's hop


def posted(http: httpx.Client, digest: str) -> httpx.Response:
    headers = {"Content-Type": "application/json", "Content-Digest": digest}
    return http.post("/v1/chat/completions", content=json.dumps(BODY).encode(), headers=headers)


def test_the_digest_of_a_client_is_checked(deployment: Deployment, http: httpx.Client) -> None:
    body = json.dumps(BODY).encode()
    sha512 = base64.b64encode(hashlib.sha512(body).digest()).decode()
    for right in (content_digest(body), f"sha-512=:{sha512}:", "md5=:AAAA:"):
        assert posted(http, right).status_code == 200
    for wrong in (content_digest(b""), "sha-256=nonsense"):
        refused = posted(http, wrong)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "body_damaged")
        assert refused.headers["x-should-retry"] == "true"
    assert len(deployment.fakes["encode0"].requests) == 3


def test_whole_answers_to_clients_have_a_digest(deployment: Deployment, http: httpx.Client) -> None:
    answers: list[Any] = [http.post("/v1/chat/completions", json=BODY), http.get("/v1/models"), http.get("/nothing")]
    for answer in answers:
        assert answer.headers["content-digest"] == content_digest(answer.content)
    streamed = http.post("/v1/chat/completions", json=BODY | {"stream": True})
    assert "content-digest" not in streamed.headers
