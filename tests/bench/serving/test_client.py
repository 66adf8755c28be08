"""Requests over real sockets: measurements, failures, interruption."""

from __future__ import annotations

import json
import signal
import threading

import msgspec
import pytest

from embferry.bench.serving import answers
from embferry.bench.serving.client import Endpoint, send_all
from embferry.bench.serving.endpoint import first_model
from embferry.bench.serving.results import Run, Sample
from embferry.bench.serving.workload import Picture, Request
from tests.ports import free_port

from . import stub_endpoint as stub

pytestmark = pytest.mark.integration

PICTURE = Picture((0, 0), 224, 224, 64)


def asked(*counts: int) -> list[Request]:
    """Returns requests with so many pictures each, all at the same time."""
    return [Request(number, 0.0, (PICTURE,) * count) for number, count in enumerate(counts)]


def measure(url: str, *counts: int, timeout_s: float = 60.0, concurrency: int = 0) -> list[Sample]:
    endpoint = Endpoint(url, "m", max_tokens=3, timeout_s=timeout_s, concurrency=concurrency)
    run = Run("name", "title")
    send_all(endpoint, asked(*counts), run)
    assert run.complete
    assert run.duration > 0
    return run.samples


def test_an_answer_is_measured() -> None:
    bodies = []

    def answer(request: stub.Request) -> None:
        bodies.append(request.body)
        request.answer([5, 6, 7])

    with stub.serving(answer) as url:
        (sample,) = measure(url, 2)
    assert (sample.error, sample.status, sample.tokens, sample.text) == ("", 200, (5, 6, 7), "xxx")
    assert (sample.output_tokens, sample.prompt_tokens) == (3, 10)
    assert (sample.pictures, sample.image_tokens) == (2, 128)
    assert sample.ttft is not None
    assert 0 < sample.ttft <= sample.latency
    assert sum(sample.itls) == pytest.approx(sample.latency - sample.ttft)
    (body,) = bodies
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 3, 0, True)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]


def test_a_failed_request_has_its_reason() -> None:
    def answer(request: stub.Request) -> None:
        match request.pictures:
            case 1:
                request.answer([1])
            case 2:
                request.refuse(503, '{"error": {"code": "peer_gone", "message": "the encoder is gone"}}')
            case 3:
                request.refuse(500, "no JSON at all")
            case 4:
                request.open()
                request.event({"choices": [{"delta": {"content": "cut"}}]})

    with stub.serving(answer) as url:
        samples = measure(url, 1, 2, 3, 4)
    assert [sample.number for sample in samples] == [0, 1, 2, 3]
    assert [sample.error for sample in samples] == [
        "",
        "HTTP 503: [peer_gone] the encoder is gone",
        "HTTP 500: no JSON at all",
        "the answer ended in the middle",
    ]
    assert [sample.status for sample in samples] == [200, 503, 500, 200]


def test_a_request_without_an_answer_runs_out_of_time() -> None:
    with stub.serving(stub.Request.hang) as url:
        (sample,) = measure(url, 1, timeout_s=1.0)
    assert (sample.status, "within 1 s" in sample.error) == (None, True)
    assert sample.latency >= 1.0


def test_a_refused_connection_is_a_failure() -> None:
    (sample,) = measure(f"http://127.0.0.1:{free_port()}", 1)
    assert sample.status is None
    assert sample.error.startswith("ConnectError")


def test_no_more_requests_are_under_way_than_allowed() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def answer(request: stub.Request) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        request.open()
        request.event({"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": [1]}]})
        with lock:
            now -= 1  # before the last event: then the client may send the next request
        request.event("[DONE]")

    with stub.serving(answer) as url:
        assert len(measure(url, *[1] * 12, concurrency=2)) == 12
    assert 1 <= most <= 2


def test_requests_are_sent_at_their_times() -> None:
    made = [Request(0, 0.0, ()), Request(1, 0.3, ())]
    seen: list[tuple[int, float]] = []
    with stub.serving(lambda request: request.answer([1])) as url:
        send_all(Endpoint(url, "m"), made, Run("", ""), began=lambda number, at: seen.append((number, at)))
    assert [number for number, _ in seen] == [0, 1]
    assert seen[1][1] >= 0.3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_samples_that_had_ended(number: signal.Signals) -> None:
    def answer(request: stub.Request) -> None:
        if request.pictures == 1:
            request.answer([1])
        else:
            request.hang()

    run = Run("name", "title")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with stub.serving(answer) as url, pytest.raises(KeyboardInterrupt):
            send_all(Endpoint(url, "m", timeout_s=60), asked(1, 2, 2), run, lambda sample: signal.raise_signal(number))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not run.complete
    assert [sample.number for sample in run.samples] == [0]


def test_a_request_has_its_id_and_a_reason_does_not_repeat_a_picture() -> None:
    def answer(request: stub.Request) -> None:
        rids.append(request.body.get("rid"))
        picture = request.body["messages"][0]["content"][0]["image_url"]["url"]
        request.refuse(400, f'{{"object": "error", "message": "no picture: {picture}, sorry"}}')

    rids: list[str | None] = []
    run, (first, second) = Run("", ""), asked(1, 1)
    with stub.serving(answer) as url:
        send_all(Endpoint(url, "m", concurrency=1), [first, msgspec.structs.replace(second, rid="mine")], run)
    assert rids == [None, "mine"]
    assert run.samples[1].error == "HTTP 400: no picture: data:…, sorry"


def test_right_answers_are_asked_for_one_by_one() -> None:
    endpoint = Endpoint("", "m", max_tokens=2)
    made = asked(1, 2)
    with stub.serving(lambda request: request.answer([request.pictures])) as url:
        known = answers.ask(Endpoint(url, "m", max_tokens=2), made)
    assert [known[number].tokens for number in (0, 1)] == [(1,), (2,)]
    with stub.serving(lambda request: request.refuse(500, "{}")) as url, pytest.raises(ValueError, match="HTTP 500"):
        answers.ask(Endpoint(url, endpoint.model), made)


def test_the_first_listed_model_is_found() -> None:
    with stub.serving(stub.Request.hang, {"/v1/models": '{"data": [{"id": "one"}, {"id": "two"}]}'}) as url:
        assert first_model(Endpoint(url, "")) == "one"
    with stub.serving(stub.Request.hang) as url, pytest.raises(ValueError, match="lists no model"):
        first_model(Endpoint(url, ""))


def test_pictures_and_videos_are_parts_of_their_kind() -> None:
    request = Request(0, 0.0, (Picture((1, 0), 56, 28, 2), Picture((1, 1), 56, 28, 2, frames=2)))
    content = json.loads(Endpoint("", "m").body(request))["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "video_url", "text"]
    assert content[1]["video_url"]["url"].startswith("data:video/jpeg;base64,")
