"""Workers that are gone, full, silent or senseless, and clients that leave: always an error, never half an answer."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import BREAK, END, HOLD, Deployment, closed_port, tokens

pytestmark = pytest.mark.integration

QUESTION = user({"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}, "?")
BODY = {"model": "shapes", "messages": QUESTION}


def envelope(code: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": f"the worker says {code}", "code": code, **more}}


def failure(client: openai.OpenAI, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="shapes", messages=QUESTION, **options)
    return caught.value


def room_of(deployment: Deployment) -> int:
    return int(deployment.fakes["encode0"].requests[0]["room"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("worker", "status", "code"),
    [
        ("encode0", 400, "image_truncated"),
        ("encode0", 500, "engine_error"),
        ("language0", 400, "context_length_exceeded"),
        ("language0", 502, "integrity_error"),
        ("language0", 503, "queue_full"),
    ],
)
def test_an_error_of_a_worker_is_passed_on(
    deployment: Deployment, client: openai.OpenAI, worker: str, status: int, code: str, stream: bool
) -> None:
    deployment.fakes[worker].refusal = (status, envelope(code, param="messages"))
    error = failure(client, stream=stream)
    assert (error.status_code, error.code, error.param) == (status, code, "messages")
    assert f"the worker says {code}" in error.message
    deployment.wait(lambda: deployment.fakes["encode0"].aborted == [room_of(deployment)])


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_becomes_the_status(
    deployment: Deployment, client: openai.OpenAI, stream: bool
) -> None:
    event = {"type": "error", **envelope("lease_expired", status=504, retryable=True)}
    deployment.fakes["language0"].script = [{"type": "ping"}, event]
    error = failure(client, stream=stream)
    assert (error.status_code, error.code) == (504, "lease_expired")
    assert error.response.headers["x-should-retry"] == "true"
    deployment.wait(lambda: all(deployment.fakes[n].aborted == [room_of(deployment)] for n in ("encode0", "language0")))


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ({"type": "error", **envelope("peer_gone", status=503, retryable=True)}, "peer_gone"),
        (BREAK, "worker_failed"),
        ("{not json", "worker_failed"),
        ('{"type": "surprise"}', "worker_failed"),
        ('{"type": "token", "text": 5, "token_id": 1}', "worker_failed"),
        ('{"type": "end"}', "worker_failed"),
        (None, "worker_failed"),
    ],
)
def test_an_error_after_the_first_token_ends_the_stream_with_an_error(
    deployment: Deployment, client: openai.OpenAI, last: Any, code: str
) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), *([last] if last else [])]
    stream = client.chat.completions.create(model="shapes", messages=QUESTION, stream=True)
    seen = [next(stream).choices[0].delta.content for _ in range(2)]
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert caught.value.code == code
    assert seen == ["", "a "]
    deployment.wait(lambda: all(deployment.fakes[n].aborted == [room_of(deployment)] for n in ("encode0", "language0")))


@pytest.mark.parametrize("last", [BREAK, "{not json", '{"type": "error", "error": "?"}', None])
def test_an_answer_that_breaks_off_is_no_answer(deployment: Deployment, client: openai.OpenAI, last: Any) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), *([last] if last else [])]
    error = failure(client)
    assert (error.status_code, error.code) == (502, "worker_failed")


def test_a_stream_that_fails_has_no_done(deployment: Deployment, http: httpx.Client) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), BREAK]
    text = http.post("/v1/chat/completions", json={**BODY, "stream": True}).text
    assert "[DONE]" not in text
    assert '"code":"worker_failed"' in text.split("\n\n")[-2]


@pytest.mark.parametrize("fault", [BREAK, (503, envelope("capacity_exhausted")), "refuses"])
def test_another_encode_worker_is_tried(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client, fault: Any
) -> None:
    with closed_port() as nobody:
        changes = {"url": nobody} if fault == "refuses" else {}
        deployment.fakes["encode0"].refusal = None if fault == "refuses" else fault
        first = deployment.entry("encode0", **changes)
        deployment.workers = [first, deployment.entry("encode1", load=5), deployment.entry("language0")]
        deployment.wait(lambda: http.get("/ready").json()["workers"]["encode"] == 2)
        answer = client.chat.completions.create(model="shapes", messages=QUESTION)
    assert answer.choices[0].message.content == "a red circle"
    assert len(deployment.fakes["encode1"].requests) == 1
    assert deployment.fakes["language0"].requests[0]["room"] == deployment.fakes["encode1"].requests[0]["room"]


@pytest.mark.parametrize("role", ["encode", "language"])
def test_no_worker_can_be_reached(deployment: Deployment, client: openai.OpenAI, http: httpx.Client, role: str) -> None:
    with closed_port() as nobody:
        deployment.workers = [
            deployment.entry(name, **({"url": nobody} if name.startswith(role) else {}))
            for name in ("encode0", "encode1", "language0")
        ]
        deployment.wait(lambda: http.get("/ready").json()["workers"]["encode"] == 2)
        error = failure(client)
    assert (error.status_code, error.code) == (503, "no_worker")
    assert nobody in error.message
    assert f"{role}0" in error.message
    assert error.response.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("role", ["encode", "language"])
def test_no_worker_is_there(deployment: Deployment, client: openai.OpenAI, http: httpx.Client, role: str) -> None:
    deployment.workers = [entry for entry in deployment.workers if entry["role"] != role]
    deployment.wait(lambda: http.get("/ready").json()["workers"][role] == 0)
    error = failure(client)
    assert (error.status_code, error.code) == (503, "no_worker")
    assert role in error.message


def test_a_worker_that_came_a_moment_ago_is_found() -> None:
    late = Deployment(poll_interval=1000)
    there, late.workers = late.workers, []
    with late as other, httpx.Client(base_url=other.url, verify=False, trust_env=False) as http:
        assert http.post("/v1/chat/completions", json=BODY).json()["error"]["code"] == "no_worker"
        other.workers = there
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200


def test_generation_that_began_is_not_tried_elsewhere(deployment: Deployment, client: openai.OpenAI) -> None:
    deployment.fakes["language0"].refusal = BREAK
    error = failure(client)
    assert (error.status_code, error.code) == (502, "worker_failed")
    assert len(deployment.fakes["language0"].requests) == 1


@pytest.mark.parametrize("body", ["", "[]", "no json", '{"endpoint": "tcp://a:1", "items": []}', '{"items": [1]}'])
def test_a_senseless_answer_of_the_encode_worker(deployment: Deployment, client: openai.OpenAI, body: str) -> None:
    deployment.fakes["encode0"].refusal = (200, body)
    error = failure(client)
    assert (error.status_code, error.code) == (502, "worker_failed")
    assert deployment.fakes["language0"].requests == []


@pytest.mark.parametrize("body", ["", "oops", '{"error": 5}', "[]"])
def test_a_senseless_error_of_a_worker(deployment: Deployment, client: openai.OpenAI, body: str) -> None:
    deployment.fakes["encode0"].refusal = (500, body)
    error = failure(client)
    assert (error.status_code, error.code) == (502, "worker_failed")


@pytest.mark.parametrize("deployment", [{"request_timeout": 0.3}], indirect=True)
@pytest.mark.parametrize("silent", ["encode0", "language0"])
def test_a_request_that_takes_too_long(deployment: Deployment, client: openai.OpenAI, silent: str) -> None:
    deployment.fakes[silent].refusal = HOLD
    started = time.monotonic()
    error = failure(client)
    assert (error.status_code, error.code) == (504, "request_timeout")
    assert 0.3 <= time.monotonic() - started < 5
    deployment.wait(lambda: deployment.fakes[silent].aborted == [room_of(deployment)])
    deployment.wait(lambda: deployment.fakes[silent].left == 1)


@pytest.mark.parametrize("deployment", [{"request_timeout": 0.5}], indirect=True)
def test_a_stream_that_takes_too_long(deployment: Deployment, client: openai.OpenAI) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), HOLD, END]
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model="shapes", messages=QUESTION, stream=True))
    assert caught.value.code == "request_timeout"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["encode", "before the first token", "after it"])
def test_a_client_that_leaves_is_an_abort_on_both_workers(
    deployment: Deployment, http: httpx.Client, stage: str, stream: bool
) -> None:
    held = "encode0" if stage == "encode" else "language0"
    if stage == "after it":
        deployment.fakes[held].script = [*tokens("a "), HOLD, END]
    else:
        deployment.fakes[held].refusal = HOLD
    with httpx.Client(base_url=deployment.url, verify=False, trust_env=False) as leaving:
        retry_policy = httpx.Timeout(10, read=0.3)
        with pytest.raises(httpx.ReadTimeout):
            leaving.post("/v1/chat/completions", json={**BODY, "stream": stream}, timeout=retry_policy)
    reached = ["encode0"] if stage == "encode" else ["encode0", "language0"]
    deployment.wait(lambda: all(deployment.fakes[name].aborted == [room_of(deployment)] for name in reached))
    deployment.wait(lambda: deployment.fakes[held].left == 1)
    deployment.wait(lambda: "embferry_chat_aborted_total 1.0" in http.get("/metrics").text)
    deployment.wait(lambda: "embferry_chat_in_flight 0.0" in http.get("/metrics").text)


def test_nothing_is_aborted_after_a_good_answer(deployment: Deployment, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="shapes", messages=QUESTION)
    deployment.fakes["language0"].script = [BREAK]
    failure(client)  # its aborts come after any the first request could have caused
    second = deployment.fakes["encode0"].requests[1]["room"]
    deployment.wait(lambda: deployment.fakes["language0"].aborted != [])
    assert deployment.fakes["encode0"].aborted in ([], [second])
    assert deployment.fakes["language0"].aborted == [second]


def test_many_at_once_are_all_answered_right(http: httpx.Client) -> None:
    def one(number: int) -> tuple[Any, str]:
        body = {**BODY, "messages": [*QUESTION, {"role": "user", "content": str(number)}]}
        answer = http.post("/v1/chat/completions", json=body).json()
        return answer["embferry"]["room"], answer["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(one, range(60)))
    assert len({room for room, _ in outcomes}) == 60
    assert {text for _, text in outcomes} == {"a red circle"}
