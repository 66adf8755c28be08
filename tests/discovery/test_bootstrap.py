"""The server and its client over real sockets."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from embferry.discovery.bootstrap_server import BootstrapClient, BootstrapServer, LeaseKeeper, Rank, Worker
from embferry.protocol.errors import (
    CapacityError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
)

pytestmark = pytest.mark.integration

WORKER = Worker(id="enc-1", role="encode", url="http://h:1", endpoint="tcp://h:2", model="shapes")
ROUTE = {"role": "Encode", "tp_size": 2, "dp_size": 1, "rank_ip": "10.0.0.7", "rank_port": 7000, "engine_rank": 1}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Iterator[BootstrapServer]:
    threads = set(threading.enumerate())
    with BootstrapServer(lease_seconds=5, max_workers=2, clock=clock) as running:
        yield running
    assert set(threading.enumerate()) <= threads
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", running.port), timeout=2):
        pass


@pytest.fixture
def client(server: BootstrapServer) -> BootstrapClient:
    return BootstrapClient(server.url)


def ask(server: BootstrapServer, method: str, path: str, body: object = None) -> tuple[int, object]:
    """As anybody's HTTP client would."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=5)
    try:
        connection.request(method, path, body if isinstance(body, bytes) or body is None else json.dumps(body).encode())
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


def raw(server: BootstrapServer, data: bytes) -> bytes:
    with socket.create_connection((server.host, server.port), timeout=5) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def until(condition: Callable[[], tuple[Worker, ...]]) -> tuple[Worker, ...]:
    """The first answer that is not empty; there is a deadline."""
    pause = threading.Event()
    for _ in range(1000):
        if answer := condition():
            return answer
        pause.wait(0.01)
    raise AssertionError("the condition did not come true within 10 s")


def test_a_worker_comes_renews_and_leaves(server, client, clock):
    lease = client.register(WORKER)
    assert (lease.lease_seconds, lease.new) == (5, True)
    clock.now += 4
    assert not client.renew(WORKER).new
    clock.now += 4
    assert client.workers() == client.workers("encode") == server.workers() == (WORKER,)
    assert client.workers("language") == ()
    assert client.remove("enc-1")
    assert not client.remove("enc-1")
    assert client.workers() == ()


def test_a_worker_that_falls_silent_is_taken_off_the_list(client, clock, caplog):
    client.register(WORKER)
    clock.now += 5
    assert client.workers() == ()
    assert "encode worker enc-1 has not renewed its lease" in caplog.text
    assert client.register(WORKER).new


def test_the_origin_s_routes_word_by_word(server):
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


def test_ranks_through_the_client(client):
    with pytest.raises(PeerGone, match="start the encode worker"):
        client.shape()
    client.register_rank(Rank(tp_size=2, dp_size=2, rank_ip="h", rank_port=1, engine_rank=1))
    assert client.shape().embedding_dp_size == 2
    assert client.route(0, 1).rank_port == 1
    with pytest.raises(PeerGone, match="no encode rank 1 of group 1"):
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
def test_bad_requests_are_refused_and_harm_nobody(server, client, method, path, body, status, code):
    answered, content = ask(server, method, path, body)
    assert (answered, content["error"]["code"]) == (status, code)
    assert content["error"]["message"]
    assert client.register(WORKER).new


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.0\r\n\r\n", 400),
        (b"PUT /route HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"PUT /route HTTP/1.0\r\nContent-Length: -1\r\n\r\n", 411),
        (b"PUT /route HTTP/1.0\r\nContent-Length: 999999999999\r\n\r\n", 413),
        (b"GET /" + b"x" * 70000 + b" HTTP/1.0\r\n\r\n", 414),
        (b"PURGE /health HTTP/1.0\r\n\r\n", 501),
    ],
)
def test_what_is_hardly_http_gets_an_answer_too(server, data, status):
    answer = raw(server, data)
    assert str(status).encode() in answer.partition(b"\r\n")[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_body_that_ends_early_changes_nothing(server, client):
    body = json.dumps({"id": "enc-1", "role": "encode"}).encode()
    head = f"PUT /workers/enc-1 HTTP/1.0\r\nContent-Length: {len(body) + 1}\r\n\r\n".encode()
    assert raw(server, head + body) == b""
    assert client.workers() == ()


def test_a_full_list_says_so(client):
    for name in ("a", "b"):
        client.register(Worker(id=name, role="language"))
    with pytest.raises(CapacityError, match="2 workers are registered"):
        client.register(WORKER)


def test_too_many_connections_are_turned_away_and_stop_ends_the_rest(server, monkeypatch):
    monkeypatch.setattr("embferry.discovery.bootstrap_server.MAX_CONNECTIONS", 2)
    address = (server.host, server.port)
    with socket.create_connection(address, timeout=5) as one, socket.create_connection(address, timeout=5) as two:
        with socket.create_connection(address, timeout=5) as three:
            assert three.recv(1) == b""
        server.stop()  # does not wait until the two silent clients time out
        assert one.recv(1) == two.recv(1) == b""


def test_a_taken_port_is_a_clear_error(server):
    with pytest.raises(TransportError, match=f"cannot listen on 127.0.0.1:{server.port}") as caught:
        BootstrapServer(port=server.port).start()
    assert not caught.value.retryable
    with pytest.raises(TransportError, match="port"):
        BootstrapServer(port=70000).start()
    with pytest.raises(LocalProtocolError, match="started already"):
        server.start()


def test_nobody_there_and_somebody_else_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = BootstrapClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=5)

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-something\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RemoteProtocolError, match="not a bootstrap server"):
            client.workers()
        thread.join()
    with pytest.raises(TransportError, match="cannot be reached") as caught:
        client.workers()
    assert caught.value.retryable
    assert not client.healthy()


@pytest.mark.parametrize("url", ["", "host:80", "ftp://h", "http://", "http://h:x", "http://h/path", "http://[h"])
def test_urls_are_checked_at_once(url):
    with pytest.raises(LocalProtocolError, match="URL"):
        BootstrapClient(url)


def test_a_keeper_returns_to_a_server_that_was_restarted():
    first = BootstrapServer(lease_seconds=0.3)
    first.start()
    keeper = LeaseKeeper(BootstrapClient(first.url), WORKER, load=lambda: 3.0)
    keeper.start()
    try:
        assert keeper.wait_registered(10)
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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, -signal.SIGINT)])
def test_as_a_process_it_ends_cleanly_when_told(number, status):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = f"from embferry.discovery.bootstrap_server import run; run('127.0.0.1', {port}, 5.0)"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        try:
            client = BootstrapClient(f"http://127.0.0.1:{port}")
            until(lambda: (WORKER,) if client.healthy() else ())
            process.send_signal(number)
            assert process.wait(10) == status
        finally:
            process.kill()
