"""Slow and hostile clients cost the other clients of the bootstrap server nothing."""

from __future__ import annotations

import contextlib
import errno
import resource
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from embferry.discovery import bootstrap_client, bootstrap_server, http_server
from embferry.discovery.bootstrap_client import BootstrapClient, LeaseKeeper
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.leases import Worker
from embferry.discovery.server_limits import ServerLimits
from embferry.trust.chunks import FREE_CHUNKS
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.trust import Trust
from tests.strangers.raw_http import request, send, status_of

pytestmark = pytest.mark.integration

SECONDS = 60.0
SLOW_CONNECTIONS = 1000
DRIP_SECONDS = 3.0
RENEWALS = 12
"""Renewals of each worker, three a second: within four seconds, every slow connection sends a byte."""


class SlowClients:
    """Holds many connections that send a byte each few seconds, or nothing; replaces each that the server closes.

    Attributes:
        replaced: Connections that the server has closed.
    """

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self.count, self.replaced = count, 0
        self._address = address
        self._selector = selectors.DefaultSelector()
        self._stopping = threading.Event()
        self._all_open = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> SlowClients:
        self._thread.start()
        assert self._all_open.wait(SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._selector.close()

    def _run(self) -> None:
        for number in range(self.count):
            self._open(number)
        self._all_open.set()
        next_drip = 0.0
        while not self._stopping.is_set():
            for key, _ in self._selector.select(0.1):
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
                self.replaced += 1
                self._open(key.data)
            if time.monotonic() >= next_drip:
                next_drip = time.monotonic() + DRIP_SECONDS
                self._drip()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()

    def _open(self, number: int) -> None:
        connection = socket.create_connection(self._address, timeout=SECONDS)
        self._selector.register(connection, selectors.EVENT_READ, number)

    def _drip(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data % 2:
                with contextlib.suppress(OSError):  # closed, which the next select shows
                    key.fileobj.send(b"G")


@pytest.fixture
def slow_connections() -> int:
    """As many as this machine's limit of open files allows, up to 1,000."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * SLOW_CONNECTIONS
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))
    return min(SLOW_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


@pytest.fixture
def keepers() -> Iterator[list[LeaseKeeper]]:
    running: list[LeaseKeeper] = []
    yield running
    for keeper in running:
        keeper.stop()


def _limits(**changes: float) -> ServerLimits:
    return ServerLimits(**({"request_timeout": SECONDS, "connections": 64, "connections_per_address": 64} | changes))


def _connect(server: BootstrapServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=SECONDS)


def _rest(connection: socket.socket) -> bytes:
    """Returns everything up to the end of a connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def test_slow_connections_keep_no_renewal_out(slow_connections, keepers, caplog, monkeypatch):
    """The leases run on a clock that stands still: a busy machine may delay a renewal, but none may fail."""
    monkeypatch.setattr(bootstrap_client, "STOP_SECONDS", SECONDS)
    with BootstrapServer(lease_seconds=1.0, clock=lambda: 100.0) as server:
        renewals = [threading.Semaphore(0) for _ in range(4)]
        with SlowClients((server.host, server.port), slow_connections) as slow:
            for number, renewed in enumerate(renewals):
                client = BootstrapClient(server.url, timeout_s=SECONDS)
                worker = Worker(id=f"w{number}", role="encode")
                keeper = LeaseKeeper(client, worker, lambda renewed=renewed: float(renewed.release() or 0))
                keepers.append(keeper)
                keeper.start()
            for renewed in renewals:
                for _ in range(RENEWALS):
                    assert renewed.acquire(timeout=SECONDS)
            assert slow.replaced
        assert {worker.id for worker in server.workers()} == {"w0", "w1", "w2", "w3"}
        for keeper in keepers:
            keeper.stop()
        assert server.workers() == ()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("embferry.discovery.bootstrap_client")] == []


def test_a_request_that_drips_ends_with_408_in_its_time():
    with BootstrapServer(limits=_limits(request_timeout=0.2)) as server, _connect(server) as connection:
        connection.settimeout(0.02)
        received = b""
        with contextlib.suppress(OSError):  # a byte after the end may reset the connection
            for _ in range(int(SECONDS / 0.02)):
                connection.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    received = connection.recv(4096)
                    break
        assert received.startswith(b"HTTP/1.1 408")
        assert b"embferry_bootstrap_timed_out_requests_total 1\n" in _metrics(server)


def test_a_body_that_never_ends_is_ended_too():
    with BootstrapServer(limits=_limits(request_timeout=0.2)) as server, _connect(server) as connection:
        connection.sendall(b"PUT /workers/w HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
        assert _rest(connection).startswith(b"HTTP/1.1 408")


def test_a_body_in_tiny_chunks_is_refused_also_where_nothing_is_proved():
    """Each chunk costs the server's one thread as much as hundreds of bytes; the leases are renewed on it."""
    with BootstrapServer() as server, _connect(server) as connection:
        head = b"GET /health HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"1\r\na\r\n" * (2 * FREE_CHUNKS) + b"0\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = _rest(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"send fewer and larger ones" in answer


def test_a_full_server_closes_the_oldest_connection_of_the_same_address():
    with (
        BootstrapServer(limits=_limits(connections_per_address=2)) as server,
        _connect(server) as oldest,
        _connect(server) as second,
        _connect(server) as third,
    ):
        answer = _rest(oldest)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1\r\n" in answer
        third.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"embferry_bootstrap_evicted_connections_total 1\n" in _rest(third)
        server.stop()
        assert _rest(second) == b""


def test_the_number_of_connections_stays_below_the_limit_of_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    with BootstrapServer(limits=_limits()) as server, _connect(server) as oldest, _connect(server), _connect(server):
        assert _rest(oldest).startswith(b"HTTP/1.1 503")


def test_responses_that_are_not_read_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(http_server, "MAX_UNSENT_BYTES", 8 << 20)
    with BootstrapServer(limits=_limits(), clock=lambda: 100.0) as server, contextlib.ExitStack() as stack:
        text, url = "x" * 500, "http://h/" + "x" * 491
        for number in range(1024):
            server._table.put(Worker(id=f"w{number}", role="encode", url=url, endpoint=text, model=text), 100.0)
        server._http._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted sockets inherit it
        for _ in range(24):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(SECONDS)
            connection.connect((server.host, server.port))
            connection.sendall(b"GET /workers HTTP/1.0\r\n\r\n")
        assert len(BootstrapClient(server.url, timeout_s=SECONDS).workers()) == 1024
        assert b"evicted_connections_total 0" not in _metrics(server)
        assert server._http.unsent_bytes <= 8 << 20


def test_no_descriptor_for_a_connection_is_a_pause_not_an_end(monkeypatch):
    with BootstrapServer(limits=_limits()) as server:
        assert BootstrapClient(server.url, timeout_s=SECONDS).healthy()  # it has begun to listen
        listening, failures = server._http._listener.sock, iter([errno.EMFILE, errno.ENFILE])

        class Exhausted:
            """The listening socket of a process that has no descriptors for a while."""

            def __getattr__(self, name):
                return getattr(listening, name)

            def accept(self):
                for number in failures:
                    raise OSError(number, "no descriptors")
                return listening.accept()

        monkeypatch.setattr(server._http._listener, "sock", Exhausted())
        assert BootstrapClient(server.url, timeout_s=SECONDS).healthy()


def test_a_bug_in_one_request_fails_that_request_alone(monkeypatch):
    with BootstrapServer(limits=_limits()) as server:
        client = BootstrapClient(server.url, timeout_s=SECONDS)
        monkeypatch.setattr(server._table, "put", lambda *_: 1 / 0)
        with _connect(server) as connection:
            connection.sendall(b'PUT /workers/w HTTP/1.0\r\nContent-Length: 26\r\n\r\n{"id":"w","role":"encode"} ')
            assert _rest(connection).startswith(b"HTTP/1.1 500")
        assert client.healthy()


def _metrics(server: BootstrapServer) -> bytes:
    with _connect(server) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return _rest(connection)


@pytest.mark.parametrize("has_key", [False, True])
def test_requests_without_a_proof_are_limited_by_address(has_key, caplog):
    """Without a key, those of the own machine are not: the cluster is there."""
    few = ServerLimits(unproved_requests_per_second=1.0)
    trust = Trust(ClusterKeys(Key.new()) if has_key else None)
    with BootstrapServer(limits=few, trust=trust, clock=lambda: 100.0) as server:
        server._http.rates._clock = lambda: 100.0
        client = BootstrapClient(server.url, trust=trust, timeout_s=SECONDS)
        asked = request("GET", "/health")
        statuses = [status_of(send((server.host, server.port), asked)) for _ in range(5)]
        assert statuses == [200, 200, *([429] * 3 if has_key else [200] * 3)]
        if has_key:
            answer = send((server.host, server.port), asked)
            assert b"Retry-After: 1\r\n" in answer
            assert b'"code":"rate_limited"' in answer
            assert status_of(send((server.host, server.port), request("PUT", "/workers/x", b"{}"))) == 401
            assert len([line for line in caplog.messages if "more than 1 requests a second" in line]) == 1
        for _ in range(9):  # a part goes on
            client.register(Worker(id="w", role="encode"))
        assert server._http.rates.refused == (4 if has_key else 0)


def test_bytes_without_a_proof_are_limited_by_address(monkeypatch):
    monkeypatch.setattr(bootstrap_server, "is_loopback", lambda host: False)
    few = ServerLimits(unproved_bytes_per_second=100.0)
    with BootstrapServer(limits=few, clock=lambda: 100.0) as server:
        server._http.rates._clock = lambda: 100.0
        bodies = [request("PUT", "/workers/w", b" " * 300), request("GET", "/health")]
        assert [status_of(send((server.host, server.port), one)) for one in bodies] == [400, 429]
