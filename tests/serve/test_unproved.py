"""Requests without a proof of the cluster key, at the ports of workers and routers: so many a second of an address."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.observe.metrics import Metrics
from embferry.serve.config import SecuritySettings, Settings
from embferry.serve.http.proofs import OPEN_PATHS, STREAM_SECRET
from embferry.serve.http.unproved import Unproved, rates_of
from embferry.serve.origin import process as origin_process
from embferry.serve.router import app as before_workers
from embferry.serve.vllm import app as before_vllm
from embferry.serve.worker import process as worker_process
from embferry.serve.worker.errors import error_response
from embferry.trust.keys import Key

STRANGER = "192.0.2.9"
FEW = Settings(security=SecuritySettings(unproved_requests_per_second=1, unproved_bytes_per_second=100))


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    """An application whose answer is the number of bytes of the body."""
    nbytes = 0
    while True:
        message = await receive()
        nbytes += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await PlainTextResponse(str(nbytes))(scope, receive, send)


def client(app: ASGIApp, address: str = STRANGER) -> TestClient:
    return TestClient(app, client=(address, 1))


def limited(settings: Settings = FEW) -> tuple[ASGIApp, Metrics]:
    metrics = Metrics()
    return Unproved(read_all, rates_of(settings.security), "the worker", error_response, metrics), metrics


def statuses(app: ASGIApp, address: str = STRANGER, times: int = 4) -> list[int]:
    http = client(app, address)
    return [http.get("/health").status_code for _ in range(times)]


def test_one_too_many_gets_429_and_another_address_does_not(caplog: pytest.LogCaptureFixture) -> None:
    app, metrics = limited()
    assert statuses(app) == [200, 200, 429, 429]
    answer = client(app).get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert (answer.json()["error"]["code"], answer.json()["error"]["retryable"]) == ("rate_limited", True)
    assert statuses(app, "192.0.2.10") == [200, 200, 429, 429]
    assert b"embferry_process_unproved_requests_refused_total 5.0" in metrics.exposition()
    assert len([line for line in caplog.messages if "more than 1 requests a second" in line]) == 1  # one a minute


def test_bytes_of_bodies_count_from_the_next_request_on() -> None:
    app, _ = limited()
    assert client(app).post("/encode", content=bytes(5000)).text == "5000"
    answer = client(app).post("/encode", content=b"x")
    assert (answer.status_code, "100 bytes a second" in answer.text) == (429, True)


def test_requests_with_a_proof_have_no_limit() -> None:
    app, _ = limited()

    async def proved(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, STREAM_SECRET: "of this request"}, receive, send)

    assert statuses(proved, times=50) == [200] * 50


def test_the_own_machine_is_exempt_only_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(limited()[0], "127.0.0.1", 50) == [200] * 50
    assert statuses(limited()[0], "::1", 50) == [200] * 50
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", Key.new().written())
    assert statuses(limited()[0], "127.0.0.1") == [200, 200, 429, 429]


@pytest.mark.parametrize("process", [worker_process, origin_process])
@pytest.mark.parametrize("has_key", [False, True])
def test_every_kind_of_worker_has_the_limits(monkeypatch: pytest.MonkeyPatch, process: Any, has_key: bool) -> None:
    if has_key:
        monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", Key.new().written())
    served: list[ASGIApp] = []
    monkeypatch.setattr(process, "serve_until_stopped", lambda app, *_: served.append(app))
    service: Any = SimpleNamespace(metrics=Metrics(), load=0)
    with worker_process.open_port(Settings(), 0) as listener:
        serve = process.serve_worker if process is worker_process else process.serve
        extra = ("tcp://127.0.0.1:1",) if process is worker_process else ()
        serve(read_all, service, listener, FEW, "encode", *extra, lambda url: None)
    assert statuses(served[0]) == [200, 200, 429, 429]
    if has_key and process is worker_process:  # what is refused anyway is not counted
        http = client(served[0], "192.0.2.11")
        assert [http.post("/encode", content=b"x").status_code for _ in range(4)] == [401] * 4
        assert "/health" in OPEN_PATHS


@pytest.mark.parametrize("build", [before_workers.build, before_vllm.build])
def test_routers_limit_what_they_answer_to_all(build: Callable[[Settings], ASGIApp]) -> None:
    http = client(build(FEW))
    paths = ("/metrics", "/nowhere", "/health", "/ready")
    assert [http.get(path).status_code for path in paths] == [200, 404, 429, 429]
    assert http.get("/v1/models").status_code != 429  # this has the limits of clients
