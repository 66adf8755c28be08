"""Requests over real sockets: what is measured, what fails, and how it ends."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from embferry.bench.serving import answers
from embferry.bench.serving.driver import Endpoint, Watch, drive, first_model
from embferry.bench.serving.results import Sample
from embferry.bench.serving.workload import Picture, Request

from . import stub

pytestmark = pytest.mark.integration

PICTURE = Picture((0, 0), 224, 224, 64)


def asked(*counts: int) -> tuple[list[Request], list[list[str]]]:
    """Requests with so many pictures, all at once."""
    made = [Request(number, 0.0, (PICTURE,) * count) for number, count in enumerate(counts)]
    return made, [["data:image/png;base64,"] * count for count in counts]


def driven(url: str, *counts: int, timeout_s: float = 20.0, concurrency: int = 0) -> list[Sample]:
    endpoint = Endpoint(url, "m", max_tokens=3, timeout_s=timeout_s, concurrency=concurrency)
    measured = drive(endpoint, *asked(*counts), Watch())
    assert measured.complete
    assert measured.duration > 0
    return measured.samples


def test_an_answer_is_measured() -> None:
    bodies = []

    def answer(exchange: stub.Exchange) -> None:
        bodies.append(exchange.body)
        exchange.answer([5, 6, 7])

    with stub.serving(answer) as url:
        (sample,) = driven(url, 2)
    assert (sample.error, sample.status, sample.tokens, sample.text) == ("", 200, (5, 6, 7), "xxx")
    assert (sample.output_tokens, sample.prompt_tokens) == (3, 10)
    assert (sample.pictures, sample.image_tokens) == (2, 128)
    assert sample.ttft is not None
    assert 0 < sample.ttft <= sample.latency
    assert sum(sample.itls) == pytest.approx(sample.latency - sample.ttft)
    (body,) = bodies
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 3, 0, True)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]


def test_what_fails_is_counted_with_its_reason() -> None:
    def answer(exchange: stub.Exchange) -> None:
        match exchange.pictures:
            case 1:
                exchange.answer([1])
            case 2:
                exchange.refuse(503, '{"error": {"code": "peer_gone", "message": "the encoder is gone"}}')
            case 3:
                exchange.refuse(500, "no JSON at all")
            case 4:
                exchange.hang()
            case 5:
                exchange.open()
                exchange.event({"choices": [{"delta": {"content": "cut"}}]})

    with stub.serving(answer) as url:
        samples = driven(url, 1, 2, 3, 4, 5, timeout_s=1.0)
    assert [sample.number for sample in samples] == [0, 1, 2, 3, 4]
    assert [sample.error for sample in samples] == [
        "",
        "HTTP 503: [peer_gone] the encoder is gone",
        "HTTP 500: no JSON at all",
        "no whole answer within 1 s",
        "the answer ended in the middle",
    ]
    assert [sample.status for sample in samples] == [200, 503, 500, None, 200]
    assert samples[3].latency >= 1.0


def test_nobody_there_is_a_failure() -> None:
    with stub.serving(stub.Exchange.hang) as url:
        pass
    (sample,) = driven(url, 1)
    assert sample.status is None
    assert sample.error.startswith("ConnectError")


def test_no_more_at_once_than_allowed() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def answer(exchange: stub.Exchange) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        exchange.answer([1])
        with lock:
            now -= 1

    with stub.serving(answer) as url:
        assert len(driven(url, *[1] * 12, concurrency=2)) == 12
    assert 1 <= most <= 2


def test_requests_are_sent_at_their_times() -> None:
    made, urls = [Request(0, 0.0, ()), Request(1, 0.3, ())], [[], []]
    seen: list[tuple[int, float]] = []
    with stub.serving(lambda exchange: exchange.answer([1])) as url:
        drive(Endpoint(url, "m"), made, urls, Watch(began=lambda number, at: seen.append((number, at))))
    assert [number for number, _ in seen] == [0, 1]
    assert seen[1][1] >= 0.3


def test_an_interrupt_leaves_what_had_ended() -> None:
    def answer(exchange: stub.Exchange) -> None:
        if exchange.pictures == 1:
            exchange.answer([1])
        else:
            exchange.hang()

    with stub.serving(answer) as url:
        watch = Watch(ended=lambda sample: os.kill(os.getpid(), signal.SIGINT))
        began = time.monotonic()
        measured = drive(Endpoint(url, "m", timeout_s=30), *asked(1, 2, 2), watch)
    assert time.monotonic() - began < 20
    assert not measured.complete
    assert [sample.number for sample in measured.samples] == [0]


def test_answers_are_asked_one_by_one_and_compared() -> None:
    endpoint = Endpoint("", "m", max_tokens=2)
    made, urls = asked(1, 2)
    with stub.serving(lambda exchange: exchange.answer([exchange.pictures])) as url:
        known = answers.ask(Endpoint(url, "m", max_tokens=2), made, urls, Watch())
    assert [known[number].tokens for number in (0, 1)] == [(1,), (2,)]
    with stub.serving(lambda exchange: exchange.refuse(500, "{}")) as url, pytest.raises(ValueError, match="HTTP 500"):
        answers.ask(Endpoint(url, endpoint.model), made, urls, Watch())


def test_the_first_model_is_found() -> None:
    with stub.serving(stub.Exchange.hang, {"/v1/models": '{"data": [{"id": "one"}, {"id": "two"}]}'}) as url:
        assert first_model(url) == "one"
    with stub.serving(stub.Exchange.hang) as url, pytest.raises(ValueError, match="names no model"):
        first_model(url)
