"""Workers that stall, are slow, or fail before the client has received anything; and requests that hold too much."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import openai
import pytest

from embferry.testing.proxy import ChaosProxy
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import BREAK, DEADLINE, END, HOLD, Deployment, tokens

pytestmark = pytest.mark.integration

QUESTION = user({"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}, "?")
BODY = {"model": "shapes", "messages": QUESTION}
STALL = {"stall_timeout": 2}
"""Seconds; a fake that answers does so at once, also on a busy machine."""
stalls = pytest.mark.parametrize("deployment", [STALL], indirect=True)


def with_second(deployment: Deployment, http: httpx.Client, role: str) -> None:
    """Adds a second worker of a role, which is asked after the first."""
    deployment.workers.append(deployment.entry(f"{role}1", load=5))
    deployment.wait(lambda: http.get("/ready").json()["workers"][role] == 2)


@stalls
def test_an_encode_worker_that_never_answers_is_passed_over(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client
) -> None:
    deployment.fakes["encode0"].refusal = HOLD
    with_second(deployment, http, "encode")
    answer = client.chat.completions.create(model="shapes", messages=QUESTION)
    assert answer.choices[0].message.content == "a red circle"
    assert len(deployment.fakes["encode1"].requests) == 1
    client.chat.completions.create(model="shapes", messages=QUESTION)
    assert len(deployment.fakes["encode0"].requests) == 1  # it is asked last for a while


@stalls
@pytest.mark.parametrize("side", [16, 1500], ids=["small", "large"])
def test_a_link_that_swallows_everything_is_passed_over(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client, side: int
) -> None:
    """The worker and its connections are alive; the picture is sent into the void, whole or in part."""
    noise = pictures.encoded(pictures.noise(side, side))
    question = user({"type": "image_url", "image_url": {"url": pictures.data_url(noise)}}, "?")
    with ChaosProxy(int(deployment.fake_url.rpartition(":")[2])) as link:
        link.stall()
        behind = deployment.entry("encode0", url=f"http://127.0.0.1:{link.port}/encode0")
        deployment.workers = [behind, deployment.entry("encode1", load=5), deployment.entry("language0")]
        deployment.wait(lambda: http.get("/ready").json()["workers"]["encode"] == 2)
        answer = client.chat.completions.create(model="shapes", messages=question)
    assert answer.choices[0].message.content == "a red circle"
    (asked,) = deployment.fakes["encode1"].requests
    assert asked["items"][0]["data"] == noise


@stalls
@pytest.mark.parametrize("role", ["encode", "language"])
def test_a_stalled_worker_without_another_is_an_error_with_the_reason(
    deployment: Deployment, client: openai.OpenAI, role: str
) -> None:
    deployment.fakes[f"{role}0"].refusal = HOLD
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="shapes", messages=QUESTION)
    assert caught.value.code in ("no_worker", "worker_failed")
    assert "router.stall_timeout" in caught.value.message
    assert len(deployment.fakes[f"{role}0"].requests) == 1


@stalls
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[HOLD], [{"type": "ping"}, HOLD], [BREAK]], ids=["silent", "freezes", "breaks"])
def test_another_language_worker_is_asked_before_the_first_token(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client, script: list[Any], stream: bool
) -> None:
    """The attempt is a new one, in a room of its own; the first room is aborted at both workers."""
    deployment.fakes["language0"].script = script
    with_second(deployment, http, "language")
    answer = client.chat.completions.create(model="shapes", messages=QUESTION, stream=stream)
    if stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == "a red circle"
    else:
        assert answer.choices[0].message.content == "a red circle"
    rooms = [request["room"] for request in deployment.fakes["encode0"].requests]
    assert len(set(rooms)) == 2
    assert [deployment.fakes[f"language{n}"].requests[0]["room"] for n in (0, 1)] == rooms
    deployment.wait(lambda: deployment.fakes["language0"].aborted == rooms[:1])
    deployment.wait(lambda: deployment.fakes["encode0"].aborted == rooms[:1])
    assert "embferry_router_chat_second_attempts_total 1.0" in http.get("/metrics").text


@stalls
def test_an_answer_of_which_the_client_has_seen_nothing_is_begun_again(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client
) -> None:
    deployment.fakes["language0"].script = [*tokens("a ", "blue "), HOLD, END]
    with_second(deployment, http, "language")
    answer = client.chat.completions.create(model="shapes", messages=QUESTION)
    assert answer.choices[0].message.content == "a red circle"


@stalls
def test_a_stream_that_has_begun_ends_with_an_error_when_its_worker_stalls(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client
) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), HOLD, END]
    with_second(deployment, http, "language")
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model="shapes", messages=QUESTION, stream=True))
    assert caught.value.code == "worker_failed"
    assert deployment.fakes["language1"].requests == []


def test_a_lost_embedding_is_encoded_again_by_another_worker(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client
) -> None:
    error = {"message": "the encode worker is gone", "code": "peer_gone", "status": 503, "retryable": True}
    deployment.fakes["language0"].scripts = [[{"type": "error", "error": error}]]
    with_second(deployment, http, "encode")
    answer = client.chat.completions.create(model="shapes", messages=QUESTION)
    assert answer.choices[0].message.content == "a red circle"
    assert [len(deployment.fakes[f"encode{n}"].requests) for n in (0, 1)] == [1, 1]


def test_a_request_is_attempted_twice_at_most(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client
) -> None:
    for n in (0, 1):
        deployment.fakes[f"language{n}"].script = [BREAK]
    with_second(deployment, http, "language")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="shapes", messages=QUESTION)
    assert caught.value.code == "worker_failed"
    assert [len(deployment.fakes[f"language{n}"].requests) for n in (0, 1)] == [1, 1]


def test_signs_of_life_before_an_answer_are_ignored(deployment: Deployment, client: openai.OpenAI) -> None:
    items = [{"kind": "image", "grid_thw": [1, 8, 8], "num_tokens": 16, "timestamps": [], "digest": "00" * 16}]
    described = {"room": 1, "endpoint": "tcp://127.0.0.1:1", "items": items, "total_tokens": 16}
    deployment.fakes["encode0"].refusal = (200, "\n\n\n" + json.dumps(described))
    answer = client.chat.completions.create(model="shapes", messages=QUESTION)
    assert answer.choices[0].message.content == "a red circle"


def test_an_error_after_signs_of_life_is_that_of_its_status(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client
) -> None:
    broken = {"error": {"message": "no picture", "code": "image_corrupt", "status": 400, "retryable": False}}
    full = {"error": {"message": "full", "code": "capacity_exhausted", "status": 503, "retryable": True}}
    deployment.fakes["encode0"].refusal = (200, "\n" + json.dumps(broken))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="shapes", messages=QUESTION)
    assert caught.value.code == "image_corrupt"
    deployment.fakes["encode0"].refusal = (200, "\n" + json.dumps(full))
    with_second(deployment, http, "encode")
    client.chat.completions.create(model="shapes", messages=QUESTION)
    assert len(deployment.fakes["encode1"].requests) == 1


@pytest.mark.parametrize("deployment", [{"max_held_bytes": 1000}], indirect=True)
def test_requests_beyond_the_bytes_are_refused_and_a_large_one_alone_is_not(
    deployment: Deployment, http: httpx.Client
) -> None:
    deployment.fakes["encode0"].refusal = HOLD
    answers: list[httpx.Response] = []
    large = {**BODY, "messages": [*QUESTION, *user("a" * 2000)]}
    first = threading.Thread(target=lambda: answers.append(http.post("/v1/chat/completions", json=large)))
    first.start()
    deployment.wait(lambda: deployment.fakes["encode0"].holding == 1)
    with httpx.Client(base_url=deployment.url, trust_env=False, timeout=DEADLINE) as other:
        assert held_bytes(other) > 2000
        refused = other.post("/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "capacity_exhausted"
        assert "router.max_held_bytes" in refused.json()["error"]["message"]
        deployment.fakes["encode0"].refusal = None
        deployment.release.set()
        first.join(DEADLINE)
        assert len(answers) == 1
        deployment.wait(lambda: held_bytes(other) == 0)
        assert other.post("/v1/chat/completions", json=large).status_code == 200


def held_bytes(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith("embferry_process_held_bytes ")]
    return float(value)
