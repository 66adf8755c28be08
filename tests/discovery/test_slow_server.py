"""A bootstrap server that drips or hangs costs its clients a bounded time; addresses of IPv6 work."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from embferry.discovery import bootstrap_client
from embferry.discovery.bootstrap_client import BootstrapClient, LeaseKeeper
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.leases import Worker
from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError, TransportError

pytestmark = pytest.mark.integration

SECONDS = 60.0
WORKER = Worker(id="w", role="encode")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"


class SlowServer:
    """Accepts connections; on each it sends ``data`` one byte at a time, for ever, or nothing at all.

    Attributes:
        asked: Set when a connection has been accepted.
    """

    def __init__(self, data: bytes, pause_s: float) -> None:
        self.asked = threading.Event()
        self._data, self._pause_s = data, pause_s
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self._threads = [threading.Thread(target=self._accept)]
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> SlowServer:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self.asked.set()
                thread = threading.Thread(target=self._drip, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _drip(self, connection: socket.socket) -> None:
        data = iter(self._data)
        with connection, contextlib.suppress(OSError):
            while not self._stopping.wait(self._pause_s):
                if (byte := next(data, None)) is not None:
                    connection.send(bytes([byte]))


@pytest.fixture(params=["drips", "hangs"])
def slow_server(request: pytest.FixtureRequest) -> Iterator[SlowServer]:
    with SlowServer((HEAD + b" " * 1000000) if request.param == "drips" else b"", 0.01) as server:
        yield server


def test_a_call_ends_in_its_time_whatever_the_server_sends(slow_server):
    """Without a limit for the whole call, the dripping server would hold it for hours."""
    with pytest.raises(TransportError) as caught:
        BootstrapClient(slow_server.url, timeout_s=0.3).workers()
    assert caught.value.retryable


def test_stopping_a_keeper_does_not_wait_for_a_slow_server(slow_server, monkeypatch, caplog):
    monkeypatch.setattr(bootstrap_client, "STOP_SECONDS", 0.05)
    keeper = LeaseKeeper(BootstrapClient(slow_server.url, timeout_s=5.0), WORKER)
    keeper.start()
    assert slow_server.asked.wait(SECONDS)
    keeper.stop()
    assert "leaves without it" in caplog.text  # so it did not wait for the end of the call
    keeper._thread.join(SECONDS)
    assert not keeper._thread.is_alive()


def test_an_error_of_the_load_function_does_not_end_the_keeper():
    def load() -> float:
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("not yet")
        return 7.0

    calls: list[None] = []
    with BootstrapServer() as server:
        keeper = LeaseKeeper(BootstrapClient(server.url, timeout_s=SECONDS), WORKER, load)
        keeper.start()
        assert keeper.wait_registered(SECONDS)
        assert server.workers()[0].load == 7.0
        keeper.stop()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}", RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b" " * (17 << 20), RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 20), RemoteProtocolError),
        (b"", TransportError),
    ],
    ids=["too short", "too long", "endless head", "nothing"],
)
def test_a_bad_answer_is_an_error(data, error):
    with _answering(data) as url, pytest.raises(error):
        BootstrapClient(url, timeout_s=SECONDS).workers()


def test_a_call_whose_connection_was_closed_for_another_is_repeated():
    body = b'{"error": {"code": "too_many_connections", "message": "."}}'
    evicted = b"HTTP/1.1 503 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with _answering(evicted, b"", b'HTTP/1.1 200 \r\nContent-Length: 14\r\n\r\n{"workers":[]}') as url:
        assert BootstrapClient(url, timeout_s=SECONDS).workers() == ()


@contextlib.contextmanager
def _answering(*answers: bytes) -> Iterator[str]:
    """Serves requests with the given bytes, one after another, the last for ever."""
    stopping = threading.Event()

    def answer() -> None:
        for data in itertools.chain(answers, itertools.repeat(answers[-1])):
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                if stopping.is_set():
                    return
                connection.recv(65536)
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{address[1]}"
        finally:
            stopping.set()
            socket.create_connection(address).close()
            thread.join()


def test_a_server_on_ipv6_is_served_and_asked():
    with BootstrapServer("::1") as server:
        assert server.url == f"http://[::1]:{server.port}"
        assert BootstrapClient(server.url, timeout_s=SECONDS).register(WORKER).new


def test_a_name_that_has_only_an_ipv6_address_works_for_both(monkeypatch):
    _name_system(monkeypatch, {"v6.test": ["::1"]})
    with BootstrapServer("v6.test") as server:
        assert server.url == f"http://v6.test:{server.port}"
        assert BootstrapClient(server.url, timeout_s=SECONDS).healthy()


def test_every_address_of_a_name_is_tried(monkeypatch):
    _name_system(monkeypatch, {"both.test": ["::1", "127.0.0.1"]})
    with BootstrapServer("127.0.0.1") as server:
        assert BootstrapClient(f"http://both.test:{server.port}", timeout_s=SECONDS).healthy()


@pytest.mark.parametrize("host", ["nowhere.test", "x" * 64 + ".test", "a..test"])
def test_a_name_without_an_address_is_an_error_of_both(monkeypatch, host):
    _name_system(monkeypatch, {})
    with pytest.raises(TransportError):
        BootstrapServer(host).start()
    with pytest.raises(TransportError):
        BootstrapClient(f"http://{host}:1").workers()


def test_a_url_that_is_not_ascii_is_rejected_at_once():
    with pytest.raises(LocalProtocolError):
        BootstrapClient("http://h\u00fcgel:80")


def _name_system(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
    """Replaces the system's names."""
    original: Callable[..., list[tuple]] = socket.getaddrinfo

    def lookup(host, port, *args, **options):
        if host.endswith(".test") and len(host) < 64 and ".." not in host:
            if host not in names:
                raise socket.gaierror(socket.EAI_NONAME, "no such name")
            return [entry for address in names[host] for entry in original(address, port, *args, **options)]
        return original(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
