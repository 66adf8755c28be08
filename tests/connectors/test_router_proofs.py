"""Calls of a consumer to the router before vLLM with a cluster key, over sockets, and strangers at its endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from embferry import PeerGone, TransportError
from embferry.connectors.vllm.coordinates import Coordinates
from embferry.connectors.vllm.router_client import RouterClient
from embferry.protocol.errors import WrongKey
from embferry.serve.config import Settings
from embferry.serve.http.serving import KEEP_ALIVE_SECONDS
from embferry.serve.vllm.app import build
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.trust import Trust
from tests.strangers.raw_http import Relay, request, send, status_of

pytestmark = pytest.mark.integration

KEY = Key.new()
TRUST, STRANGER, NO_KEY = Trust(ClusterKeys(KEY)), Trust(ClusterKeys(Key.new())), Trust()
SECONDS = 60.0
LOST = TransportError("the producer has gone")
AT_NO_PRODUCER = Coordinates(None, 7, 1, 8, "bfloat16", "00" * 16, failover_token="token")


@contextlib.contextmanager
def router(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Runs the router's application on a thread and yields its port."""
    with monkeypatch.context() as patch:
        patch.setattr(Trust, "of_environment", lambda: trust)
        app = build(Settings())
    listener = socket.create_server(("127.0.0.1", 0))
    limits = {"timeout_keep_alive": KEEP_ALIVE_SECONDS, "timeout_graceful_shutdown": 2}
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", **limits))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def client(port: int, trust: Trust) -> contextlib.closing[RouterClient]:
    return contextlib.closing(RouterClient(f"http://127.0.0.1:{port}", SECONDS, trust))


@pytest.mark.parametrize("trust", [TRUST, NO_KEY])
def test_a_consumer_with_the_same_key_is_answered(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    with router(trust, monkeypatch) as port, client(port, trust) as calls:
        for _ in range(2):
            with pytest.raises(PeerGone, match="no request that is being answered has this token"):
                calls.failover(AT_NO_PRODUCER, LOST).result(SECONDS)


@pytest.mark.parametrize(
    ("of_router", "of_consumer", "why"),
    [
        (TRUST, STRANGER, "has another cluster key"),
        (TRUST, NO_KEY, "asks for a cluster key, and this end has none"),
        (NO_KEY, TRUST, "has no cluster key, and this end has one"),
    ],
)
def test_a_consumer_with_another_key_learns_why(
    of_router: Trust, of_consumer: Trust, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with router(of_router, monkeypatch) as port, client(port, of_consumer) as calls:
        failover = calls.failover(AT_NO_PRODUCER, LOST)
        with pytest.raises(WrongKey, match=why):
            failover.result(SECONDS)


def test_strangers_reach_what_is_for_clients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with router(TRUST, monkeypatch) as port:
        for target in ("/ec/failovers/token", "/ec/failures/token"):
            answer = send(("127.0.0.1", port), request("POST", target, b"{}"), shuts=False)
            assert status_of(answer) == 401
        for target in ("/health", "/v1/models"):
            assert status_of(send(("127.0.0.1", port), request("GET", target), shuts=False)) == 200


def test_an_answer_that_a_stranger_writes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with router(TRUST, monkeypatch) as port, Relay(("127.0.0.1", port)) as relay, client(relay.port, TRUST) as calls:
        with pytest.raises(PeerGone):
            calls.failover(AT_NO_PRODUCER, LOST).result(SECONDS)
        relay.on_answer = lambda data: data.replace(b"HTTP/1.1 404", b"HTTP/1.1 200")
        with pytest.raises(TransportError, match="no proof"):
            calls.failover(AT_NO_PRODUCER, LOST).result(SECONDS)
