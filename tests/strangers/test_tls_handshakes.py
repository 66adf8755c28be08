"""Connections that never finish TLS's handshake, at every kind of port: bounded by number, by address and by time."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from embferry import SendManager, TcpTransport
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.server_limits import ServerLimits
from embferry.serve.http import tls_handshake
from embferry.serve.http.connections import ConnectionLimits
from embferry.serve.http.serving import listen, serve_app
from embferry.testing.pair import TransportPair, eventually
from embferry.transfer.control.endpoint import host_and_port
from embferry.transfer.control.limits import ControlLimits
from embferry.transfer.control.sockets import SocketControl
from embferry.transfer.runtime import ThreadRuntime
from embferry.transports.http import HttpTransport
from embferry.transports.net.listener import ListenLimits
from embferry.trust import Trust
from embferry.trust.tls import Tls
from tests.strangers.busy import GEOMETRY
from tests.strangers.kernel import accepted_at
from tests.strangers.raw_http import SECONDS
from tests.trust.authority import Authority

pytestmark = pytest.mark.integration

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
LONG = 300.0


@dataclass(frozen=True)
class Bounds:
    number: int = 64
    each: int = 64
    seconds: float = LONG


@contextmanager
def control(tls: Tls, bounds: Bounds) -> Iterator[tuple[int, bytes]]:
    trust = Trust(tls=tls)
    limits = ControlLimits(
        handshakes=bounds.number, handshakes_per_address=bounds.each, hello_timeout=bounds.seconds
    )  # fmt: skip
    runtime = ThreadRuntime("send", lambda loop: SocketControl(loop, "127.0.0.1", limits=limits, trust=trust))
    with closing(SendManager(GEOMETRY.layout, [TcpTransport(trust=trust)], runtime=runtime, trust=trust)) as manager:
        yield host_and_port(manager.endpoint)[1], b""


@contextmanager
def transport(
    kind: Callable[..., TcpTransport | HttpTransport], tls: Tls, bounds: Bounds
) -> Iterator[tuple[int, bytes]]:
    limits = ListenLimits(handshakes=bounds.number, handshakes_per_address=bounds.each, hello_timeout=bounds.seconds)
    with closing(TransportPair(lambda wake: kind(wake, trust=Trust(tls=tls), limits=limits))) as pair:
        ends = (pair.receiver.transport, pair.sender.transport)
        listener = next(found for end in ends if (found := end._listener()) is not None)  # type: ignore[attr-defined]
        eventually(lambda: len(listener) == 1)  # the other end of the pair
        yield listener.port, HEALTH if kind is HttpTransport else b""


@contextmanager
def bootstrap(tls: Tls, bounds: Bounds) -> Iterator[tuple[int, bytes]]:
    limits = ServerLimits(bounds.seconds, bounds.number, bounds.each)
    with BootstrapServer(trust=Trust(tls=tls), limits=limits) as server:
        yield server.port, HEALTH


@contextmanager
def served(tls: Tls, bounds: Bounds, *, clients: bool) -> Iterator[tuple[int, bytes]]:
    """The server of a router and of a worker, which asks its clients for a certificate."""
    app = Starlette(routes=[Route("/health", lambda request: PlainTextResponse("ok"))])
    started, over = threading.Event(), threading.Event()
    limits = ConnectionLimits(bounds.number, bounds.each)
    certificate = Trust(tls=tls).http_certificate(clients=clients)
    assert certificate is not None
    with listen("127.0.0.1", 0) as sock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tls_handshake, "HANDSHAKE_SECONDS", bounds.seconds)
        serving = serve_app(
            app, sock, started.set, is_broken=over.is_set, limits=limits, certificate=certificate, close_seconds=0
        )  # fmt: skip
        thread = threading.Thread(target=lambda: asyncio.run(serving))
        thread.start()
        assert started.wait(SECONDS)
        try:
            yield sock.getsockname()[1], HEALTH
        finally:
            over.set()
            thread.join(SECONDS)
            assert not thread.is_alive()


PORTS = {
    "control": control,
    "tcp": lambda tls, bounds: transport(TcpTransport, tls, bounds),
    "http": lambda tls, bounds: transport(HttpTransport, tls, bounds),
    "bootstrap": bootstrap,
    "router": lambda tls, bounds: served(tls, bounds, clients=False),
    "worker": lambda tls, bounds: served(tls, bounds, clients=True),
}


@dataclass
class OpenPort:
    """Clients at a port with TLS.

    Attributes:
        own: Connections of the port's own fleet.
    """

    port: int
    request: bytes
    tls: Tls
    held: ExitStack
    own: int

    def stranger(self, source: str = "127.0.0.1") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), SECONDS, source_address=(source, 0))
        return self.held.enter_context(sock)

    @property
    def accepted(self) -> int:
        """Connections of strangers that the process has accepted and not closed."""
        return len(accepted_at(os.getpid(), self.port)) - self.own

    def answers_the_honest(self) -> bool:
        """Asks as a part of the cluster does, from an address of its own."""
        with (
            socket.create_connection(("127.0.0.1", self.port), SECONDS, source_address=("127.0.0.99", 0)) as sock,
            self.tls.dialling().wrap_socket(sock, server_hostname="127.0.0.1") as stream,
        ):
            stream.sendall(self.request)
            return bool(stream.recv(1000))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Authority.make(tmp_path_factory.mktemp("ca")).tls("part")


@pytest.fixture(params=PORTS)
def open_port(request: pytest.FixtureRequest, tls: Tls) -> Iterator[Callable[[Bounds], OpenPort]]:
    with ExitStack() as held:

        def make(bounds: Bounds) -> OpenPort:
            port, asked = held.enter_context(PORTS[request.param](tls, bounds))  # type: ignore[operator]
            return OpenPort(port, asked, tls, held, len(accepted_at(os.getpid(), port)))

        yield make


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_their_number_is_bounded_and_the_honest_get_in(open_port: Callable[[Bounds], OpenPort]) -> None:
    port = open_port(Bounds(number=8))
    strangers = [port.stranger(f"127.0.0.{number % 20 + 1}") for number in range(40)]
    eventually(lambda: sum(map(is_open, strangers)) <= 8)
    eventually(lambda: port.accepted <= 8)  # one more while it makes room
    assert port.answers_the_honest()


def test_one_address_cannot_take_the_places_of_others(open_port: Callable[[Bounds], OpenPort]) -> None:
    port = open_port(Bounds(each=4))
    other = port.stranger("127.0.0.2")
    eventually(lambda: port.accepted == 1)
    strangers = [port.stranger() for _ in range(20)]
    eventually(lambda: sum(map(is_open, strangers)) <= 4)
    assert is_open(other)
    assert port.answers_the_honest()


def test_their_time_is_bounded_also_if_they_begin(open_port: Callable[[Bounds], OpenPort]) -> None:
    port = open_port(Bounds(seconds=1))
    silent, slow = port.stranger(), port.stranger()
    slow.sendall(b"\x16\x03\x01\x02\x00\x01")  # the head of a ClientHello of 512 bytes, which does not come
    eventually(lambda: not (is_open(silent) or is_open(slow)))
    eventually(lambda: port.accepted == 0)
    assert port.answers_the_honest()
