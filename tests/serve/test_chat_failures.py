"""Workers that are down, full, silent or broken, and clients that leave: always an error, never half an answer."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.media.decoding import media
from embferry.serve.media.decoding.cancellation import Cancellation
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import BREAK, DEADLINE, END, HOLD, Deployment, closed_port, tokens

pytestmark = pytest.mark.integration

QUESTION = user({"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}, "?")
BODY = {"model": "shapes", "messages": QUESTION}


def envelope(code: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": f"the worker failed with {code}", "code": code, **more}}


def failure(client: openai.OpenAI, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="shapes", messages=QUESTION, **options)
    return caught.value


@contextlib.contextmanager
def sent(deployment: Deployment, body: dict[str, Any]) -> Iterator[None]:
    """Sends a chat request; the client leaves at the end of the context."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: router\r\nContent-Length: {len(content)}\r\n\r\n"
    host, port = deployment.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + content)
        yield


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
def test_a_workers_error_is_passed_on(
    deployment: Deployment, client: openai.OpenAI, worker: str, status: int, code: str, stream: bool
) -> None:
    deployment.fakes[worker].refusal = (status, envelope(code, param="messages"))
    error = failure(client, stream=stream)
    assert (error.status_code, error.code, error.param) == (status, code, "messages")
    assert f"the worker failed with {code}" in error.message
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


def test_a_worker_that_is_gone_is_no_news_when_it_cannot_be_told_of_an_abort(
    deployment: Deployment, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    deployment.fakes["language0"].refusal = (400, envelope("context_length_exceeded"))

    def levels() -> list[str]:
        told = [record for record in caplog.records if "could not be told of an abort" in record.getMessage()]
        return [record.levelname for record in told if record.__dict__["worker"] == "encode0"]

    def lines(url: str) -> list[str]:
        """Returns the levels of the lines for an encode worker at ``url``, which answers /encode and then is gone."""
        caplog.clear()
        with caplog.at_level(logging.DEBUG), pytest.MonkeyPatch.context() as patch:
            build = httpx.AsyncClient.build_request

            def elsewhere(self: httpx.AsyncClient, method: str, to: str, **more: Any) -> httpx.Request:
                return build(self, method, url if method == "DELETE" else to, **more)

            patch.setattr(httpx.AsyncClient, "build_request", elsewhere)
            failure(client)
            deployment.wait(lambda: bool(levels()))
        return levels()

    with closed_port() as closed:
        assert lines(closed) == ["DEBUG"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert lines(f"http://127.0.0.1:{silent.getsockname()[1]}") == ["WARNING"]


@pytest.mark.parametrize("last", [BREAK, "{not json", '{"type": "error", "error": "?"}', None])
def test_an_answer_that_breaks_off_is_an_error(deployment: Deployment, client: openai.OpenAI, last: Any) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), *([last] if last else [])]
    error = failure(client)
    assert (error.status_code, error.code) == (502, "worker_failed")
    assert error.response.headers["x-should-retry"] == "true"


def test_a_stream_that_fails_does_not_end_with_done(deployment: Deployment, http: httpx.Client) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), BREAK]
    text = http.post("/v1/chat/completions", json={**BODY, "stream": True}).text
    assert "[DONE]" not in text
    assert '"code":"worker_failed"' in text.split("\n\n")[-2]


@pytest.mark.parametrize("fault", [BREAK, (503, envelope("capacity_exhausted")), "refuses"])
def test_another_encode_worker_is_asked_when_one_fails(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client, fault: Any
) -> None:
    with closed_port() as closed:
        changes = {"url": closed} if fault == "refuses" else {}
        deployment.fakes["encode0"].refusal = None if fault == "refuses" else fault
        first = deployment.entry("encode0", **changes)
        deployment.workers = [first, deployment.entry("encode1", load=5), deployment.entry("language0")]
        deployment.wait(lambda: http.get("/ready").json()["workers"]["encode"] == 2)
        answer = client.chat.completions.create(model="shapes", messages=QUESTION)
    assert answer.choices[0].message.content == "a red circle"
    assert len(deployment.fakes["encode1"].requests) == 1
    assert deployment.fakes["language0"].requests[0]["room"] == deployment.fakes["encode1"].requests[0]["room"]


@pytest.mark.parametrize("role", ["encode", "language"])
def test_unreachable_workers_are_named_in_the_error(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client, role: str
) -> None:
    with closed_port() as closed:
        deployment.workers = [
            deployment.entry(name, **({"url": closed} if name.startswith(role) else {}))
            for name in ("encode0", "encode1", "language0")
        ]
        deployment.wait(lambda: http.get("/ready").json()["workers"]["encode"] == 2)
        error = failure(client)
    assert (error.status_code, error.code) == (503, "no_worker")
    assert closed in error.message
    assert f"{role}0" in error.message
    assert error.message.endswith("; try again when one has started")
    assert error.response.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("role", ["encode", "language"])
def test_a_missing_role_is_named_in_the_error(
    deployment: Deployment, client: openai.OpenAI, http: httpx.Client, role: str
) -> None:
    deployment.workers = [entry for entry in deployment.workers if entry["role"] != role]
    deployment.wait(lambda: http.get("/ready").json()["workers"][role] == 0)
    error = failure(client)
    assert (error.status_code, error.code) == (503, "no_worker")
    assert role in error.message


def test_the_list_of_workers_is_refreshed_when_a_role_is_missing() -> None:
    late = Deployment(poll_interval=1000)
    workers, late.workers = late.workers, []
    with late as other, httpx.Client(base_url=other.url, verify=False, trust_env=False, timeout=DEADLINE) as http:
        assert http.post("/v1/chat/completions", json=BODY).json()["error"]["code"] == "no_worker"
        other.workers = workers
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200


def test_a_generation_that_may_have_begun_is_not_repeated_elsewhere(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    deployment.fakes["language0"].refusal = BREAK
    error = failure(client)
    assert (error.status_code, error.code) == (502, "worker_failed")
    assert len(deployment.fakes["language0"].requests) == 1


@pytest.mark.parametrize("body", ["", "[]", "no json", '{"endpoint": "tcp://a:1", "items": []}', '{"items": [1]}'])
def test_a_malformed_answer_of_the_encode_worker_is_an_error(
    deployment: Deployment, client: openai.OpenAI, body: str
) -> None:
    deployment.fakes["encode0"].refusal = (200, body)
    error = failure(client)
    assert (error.status_code, error.code) == (502, "worker_failed")
    assert deployment.fakes["language0"].requests == []


@pytest.mark.parametrize("body", ["", "oops", '{"error": 5}', "[]"])
def test_a_malformed_error_of_a_worker_is_an_error(deployment: Deployment, client: openai.OpenAI, body: str) -> None:
    deployment.fakes["encode0"].refusal = (500, body)
    error = failure(client)
    assert (error.status_code, error.code) == (502, "worker_failed")


@pytest.fixture
def _ready_decoder() -> None:
    """Starts a process that checks pictures. On a busy machine that takes longer than a request may below."""
    media.image(pictures.png(), MediaSettings(), Cancellation())


SHORT = pytest.mark.parametrize("deployment", [{"request_timeout": 3}], indirect=True)
"""Long enough for a request to reach the worker that does not answer."""


@SHORT
@pytest.mark.usefixtures("_ready_decoder")
@pytest.mark.parametrize("silent", ["encode0", "language0"])
def test_a_request_that_takes_too_long_is_aborted(deployment: Deployment, client: openai.OpenAI, silent: str) -> None:
    deployment.fakes[silent].refusal = HOLD
    error = failure(client)
    assert (error.status_code, error.code) == (504, "request_timeout")
    deployment.wait(lambda: deployment.fakes[silent].aborted == [room_of(deployment)])
    deployment.wait(lambda: deployment.fakes[silent].left == 1)


@SHORT
@pytest.mark.usefixtures("_ready_decoder")
def test_a_stream_that_takes_too_long_ends_with_an_error(deployment: Deployment, client: openai.OpenAI) -> None:
    deployment.fakes["language0"].script = [*tokens("a "), HOLD, END]
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model="shapes", messages=QUESTION, stream=True))
    assert caught.value.code == "request_timeout"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["encode", "before the first token", "after it"])
def test_when_the_client_leaves_both_workers_abort(
    deployment: Deployment, http: httpx.Client, stage: str, stream: bool
) -> None:
    held = "encode0" if stage == "encode" else "language0"
    if stage == "after it":
        deployment.fakes[held].script = [*tokens("a "), HOLD, END]
    else:
        deployment.fakes[held].refusal = HOLD
    with sent(deployment, {**BODY, "stream": stream}):
        deployment.wait(lambda: deployment.fakes[held].holding == 1)
    reached = ["encode0"] if stage == "encode" else ["encode0", "language0"]
    deployment.wait(lambda: all(deployment.fakes[name].aborted == [room_of(deployment)] for name in reached))
    deployment.wait(lambda: deployment.fakes[held].left == 1)
    deployment.wait(lambda: "embferry_router_chat_aborted_total 1.0" in http.get("/metrics").text)
    deployment.wait(lambda: "embferry_router_chat_in_flight 0.0" in http.get("/metrics").text)


def test_a_complete_answer_is_not_aborted(deployment: Deployment, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="shapes", messages=QUESTION)
    deployment.fakes["language0"].script = [BREAK]
    failure(client)  # its aborts come after any of the first request
    second = deployment.fakes["encode0"].requests[1]["room"]
    deployment.wait(lambda: deployment.fakes["language0"].aborted != [])
    assert deployment.fakes["encode0"].aborted in ([], [second])
    assert deployment.fakes["language0"].aborted == [second]


def test_concurrent_requests_are_all_answered_correctly(http: httpx.Client) -> None:
    def one(number: int) -> tuple[Any, str]:
        body = {**BODY, "messages": [*QUESTION, {"role": "user", "content": str(number)}]}
        answer = http.post("/v1/chat/completions", json=body).json()
        return answer["embferry"]["room"], answer["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(one, range(60)))
    assert len({room for room, _ in outcomes}) == 60
    assert {text for _, text in outcomes} == {"a red circle"}


def test_refusals_for_lack_of_workers_have_one_line_a_minute_each(
    deployment: Deployment, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    deployment.workers = []
    deployment.wait(lambda: http.get("/ready").status_code == 503)
    with caplog.at_level(logging.INFO, "embferry.serve.http"):
        for _ in range(5):
            assert http.post("/v1/chat/completions", json=BODY).status_code == 503
        assert http.get("/v1/models/none").status_code == 404
    told = [record.getMessage() for record in caplog.records if record.name.startswith("embferry.serve.http")]
    assert [line.partition(":")[0] for line in told] == ["refused", "request", "request"]
