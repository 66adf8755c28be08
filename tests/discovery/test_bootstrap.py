"""The bootstrap server and its client over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from embferry.discovery import bootstrap_client
from embferry.discovery.bootstrap_client import BootstrapClient, LeaseKeeper
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.leases import Rank, Worker
from embferry.protocol.errors import (
    CapacityError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
)
from tests.clock import Clock
from tests.ports import free_port

pytestmark = pytest.mark.integration

SECONDS = 60.0
"""Longest wait for an event. Far longer than any takes, so that a busy machine does not fail a test."""

WORKER = Worker(id="enc-1", role="encode", url="http://h:1", endpoint="tcp://h:2", model="shapes")
ROUTE = {"role": "Encode", "tp_size": 2, "dp_size": 1, "rank_ip": "10.0.0.7", "rank_port": 7000, "engine_rank": 1}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Iterator[BootstrapServer]:
    threads = set(threading.enumerate())
    with BootstrapServer(lease_seconds=5, max_workers=2, clock=clock) as running:
        yield running
    assert set(threading.enumerate()) <= threads
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", running.port)):
        pass


@pytest.fixture
def client(server: BootstrapServer) -> BootstrapClient:
    return BootstrapClient(server.url, timeout_s=SECONDS)


def ask(server: BootstrapServer, method: str, path: str, body: object = None) -> tuple[int, object]:
    """Sends a request as any HTTP client does. Returns the status and the decoded body."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=SECONDS)
    try:
        connection.request(method, path, body if isinstance(body, bytes) or body is None else json.dumps(body).encode())
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


def raw(server: BootstrapServer, data: bytes) -> bytes:
    """Sends bytes and returns everything that the server sends back."""
    with socket.create_connection((server.host, server.port), timeout=SECONDS) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def until(condition: Callable[[], tuple[Worker, ...]]) -> tuple[Worker, ...]:
    """Waits for the first result that is not empty and returns it."""
    pause = threading.Event()
    deadline = time.monotonic() + SECONDS
    while not (result := condition()):
        assert time.monotonic() < deadline, f"the condition did not come true within {SECONDS} s"
        pause.wait(0.01)
    return result


def test_a_worker_registers_renews_its_lease_and_is_removed(server, client, clock):
    lease = client.register(WORKER)
    assert (lease.lease_seconds, lease.new) == (5, True)
    clock.now += 4
    assert not client.register(WORKER).new
    clock.now += 4
    assert client.workers() == client.workers("encode") == server.workers() == (WORKER,)
    assert client.workers("language") == ()
    assert client.remove("enc-1")
    assert not client.remove("enc-1")
    assert client.workers() == ()


def test_a_worker_that_does_not_renew_is_removed(client, clock, caplog):
    client.register(WORKER)
    clock.now += 5
    assert client.workers() == ()
    assert "enc-1" in caplog.text
    assert client.register(WORKER).new


def test_the_list_is_complete_when_every_worker_has_had_a_lease_to_register(server, client, clock):
    client.register(WORKER)
    assert ask(server, "GET", "/workers")[1]["complete"] is False
    for _ in range(5):
        clock.now += 1
        client.register(WORKER)
    assert ask(server, "GET", "/workers")[1]["complete"] is True


def test_the_origin_s_routes_have_its_fields(server):
    assert ask(server, "GET", "/health")[0] == 200
    assert ask(server, "GET", "/route?engine_rank=-1&target_dp_group=-1")[0] == 404
    assert ask(server, "PUT", "/route", ROUTE)[0] == 200
    assert ask(server, "GET", "/route?engine_rank=-1&target_dp_group=-1") == (
        200,
        {"embedding_tp_size": 2, "embedding_dp_size": 1},
    )
    assert ask(server, "GET", "/route?engine_rank=1&target_dp_group=0") == (
        200,
        {"rank_ip": "10.0.0.7", "rank_port": 7000},
    )
    assert ask(server, "GET", "/route?engine_rank=0&target_dp_group=0")[0] == 404


def test_ranks_are_registered_and_found_through_the_client(client):
    with pytest.raises(PeerGone):
        client.shape()
    client.register_rank(Rank(tp_size=2, dp_size=2, rank_ip="h", rank_port=1, engine_rank=1))
    assert client.shape().embedding_dp_size == 2
    assert client.route(0, 1).rank_port == 1
    with pytest.raises(PeerGone, match="rank 1 of group 1"):
        client.route(1, 1)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing", None, 404, "unknown_path"),
        ("GET", "/workers/enc-1", None, 405, "unknown_method"),
        ("POST", "/workers", {}, 405, "unknown_method"),
        ("PUT", "/workers/enc-1", b"{", 400, "invalid_body"),
        ("PUT", "/workers/enc-1", b"\xff", 400, "invalid_body"),
        ("PUT", "/workers/enc-1", b"[" * 60000, 400, "invalid_body"),
        ("PUT", "/workers/enc-1", b" " * 65537, 413, "too_large"),
        ("PUT", "/workers/enc-1", {"id": "enc-1"}, 400, "invalid_body"),
        ("PUT", "/workers/enc-1", {"id": "enc-2", "role": "encode"}, 400, "invalid_worker"),
        ("PUT", "/workers/enc-1", {"id": "enc-1", "role": "encode", "load": "high"}, 400, "invalid_body"),
        ("DELETE", "/workers/enc-1", None, 404, "unknown_worker"),
        ("GET", "/workers?role=router", None, 400, "invalid_query"),
        ("GET", "/route", None, 400, "invalid_query"),
        ("GET", "/route?engine_rank=x&target_dp_group=0", None, 400, "invalid_query"),
        ("GET", "/route?engine_rank=9999999999&target_dp_group=0", None, 400, "invalid_query"),
        ("PUT", "/route", ROUTE | {"role": "Prefill"}, 400, "invalid_body"),
        ("PUT", "/route", ROUTE | {"engine_rank": 2}, 400, "invalid_body"),
    ],
)
def test_bad_requests_are_rejected_and_the_server_continues(server, client, method, path, body, status, code):
    answered, content = ask(server, method, path, body)
    assert (answered, content["error"]["code"]) == (status, code)
    assert content["error"]["message"]
    assert client.register(WORKER).new


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.0\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"PUT /route HTTP/1.0\r\nContent-Length: -1\r\n\r\n", 400),
        (b"PUT /route HTTP/1.0\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"PUT /route HTTP/1.0\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"PUT /route HTTP/1.0\r\nContent-Length: 999999999999\r\n\r\n", 413),
        (b"PUT /route HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n11000\r\n" + b"x" * 0x11000, 413),
        (b"GET /" + b"x" * 70000 + b" HTTP/1.0\r\n\r\n", 431),
        (b"GET /health HTTP/1.0\r\n" + b"a: b\r\n" * 65 + b"\r\n", 431),
        (b"PURGE /health HTTP/1.0\r\n\r\n", 405),
    ],
)
def test_malformed_http_is_answered_with_an_error(server, data, status):
    answer = raw(server, data)
    assert str(status).encode() in answer.partition(b"\r\n")[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_truncated_body_changes_nothing(server, client):
    body = json.dumps({"id": "enc-1", "role": "encode"}).encode()
    head = f"PUT /workers/enc-1 HTTP/1.0\r\nContent-Length: {len(body) + 1}\r\n\r\n".encode()
    assert raw(server, head + body) == b""
    assert client.workers() == ()


def test_a_worker_beyond_the_limit_is_rejected(client):
    for name in ("a", "b"):
        client.register(Worker(id=name, role="language"))
    with pytest.raises(CapacityError, match="2 workers"):
        client.register(WORKER)


def test_a_port_that_is_taken_or_invalid_is_an_error(server):
    with pytest.raises(TransportError, match=str(server.port)) as caught:
        BootstrapServer(port=server.port).start()
    assert not caught.value.retryable
    with pytest.raises(TransportError):
        BootstrapServer(port=70000).start()
    with pytest.raises(LocalProtocolError, match="started"):
        server.start()


def test_a_chunked_body_and_a_client_that_waits_for_permission_are_served(server, client):
    body = json.dumps({"id": "enc-1", "role": "encode"}).encode()
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    head = b"PUT /workers/enc-1 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((server.host, server.port), timeout=SECONDS) as connection:
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 100")
        connection.sendall(chunk)
        assert connection.recv(4096).startswith(b"HTTP/1.1 201")
    assert [worker.id for worker in client.workers()] == ["enc-1"]


def test_a_head_request_gets_no_body(server):
    head, _, body = raw(server, b"HEAD /health HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert b" 405 " in head
    assert body == b""


def test_a_missing_server_and_another_kind_of_server_are_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = BootstrapClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=SECONDS)

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-something\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RemoteProtocolError):
            client.workers()
        thread.join()
    with pytest.raises(TransportError) as caught:
        client.workers()
    assert caught.value.retryable
    assert not client.healthy()


@pytest.mark.parametrize("url", ["", "host:80", "ftp://h", "http://", "http://h:x", "http://h/path", "http://[h"])
def test_an_invalid_url_is_rejected_at_once(url):
    with pytest.raises(LocalProtocolError, match="URL"):
        BootstrapClient(url)


def test_a_keeper_registers_again_with_a_restarted_server(monkeypatch):
    monkeypatch.setattr(bootstrap_client, "STOP_SECONDS", SECONDS)  # its last call may take long on a busy machine
    first = BootstrapServer(port=free_port(), lease_seconds=0.3)
    first.start()
    keeper = LeaseKeeper(BootstrapClient(first.url), WORKER, load=lambda: 3.0)
    keeper.start()
    try:
        assert keeper.wait_registered(SECONDS)
        first.stop()
        with BootstrapServer(port=first.port, lease_seconds=0.3) as second:
            back = until(second.workers)
            assert [(w.id, w.load) for w in back] == [("enc-1", 3.0)]
            keeper.stop()
            assert second.workers() == ()
    finally:
        keeper.stop()
        first.stop()
    assert not [t.name for t in threading.enumerate() if t.name in ("bootstrap", "lease enc-1")]
