"""The http transport passes the conformance suite over IPv6 and through a proxy; proxies and addresses."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.conformance import TransportConformance
from embferry.testing.pair import LARGE, TransportPair
from embferry.transports.contract import Transport
from embferry.transports.http import HttpTransport
from embferry.transports.http.messages import HttpHandle
from embferry.trust import Trust
from tests.ports import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@contextmanager
def http_proxy(*arguments: str) -> Iterator[int]:
    """Starts a proxy in a process of its own and yields its port."""
    command = [sys.executable, "-m", "tests.serve.embeddings.proxy", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


class TestHttpIPv6(TransportConformance):
    def make_transport(self, wake: Callable[[], None]) -> Transport:
        return HttpTransport(wake, host="::1")


class BehindProxy(TransportConformance):
    """The conformance suite of receivers behind a forward proxy."""

    trust: Trust | None = None
    proxy = ""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def with_proxy(cls) -> Iterator[None]:
        with http_proxy() as port:
            cls.proxy = f"http://127.0.0.1:{port}"
            yield

    def make_transport(self, wake: Callable[[], None]) -> Transport:
        # The proxy notices that a receiver has gone when the next answer to its poll comes.
        return HttpTransport(wake, proxy=self.proxy, trust=self.trust, poll_s=1.0)


class TestHttpThroughProxy(BehindProxy):
    pass


def test_a_sender_behind_a_reverse_proxy() -> None:
    """The receiver knows the proxy's address and path only."""
    port = free_port()
    with http_proxy(str(port)) as front:
        advertise = f"http://127.0.0.1:{front}/some/where/"
        transports = iter((HttpTransport(), HttpTransport(port=port, advertise=advertise)))

        def make(wake: Callable[[], None]) -> Transport:
            transport = next(transports)
            transport.wake = wake
            return transport

        pair = TransportPair(make, LARGE)
        blocks = tuple(range(64))
        pair.admit(1, blocks)
        pieces = pair.fill(blocks)
        assert pair.write(1, blocks, pieces) is None
        pair.expect(pieces)
        pair.expect_refused(pair.write(2, blocks, pieces))
        pair.receiver.transport.close()
        assert pair.sender.lost().error.retryable
        pair.close()


@pytest.mark.parametrize("kind", [{"host": "0.0.0.0"}, {"host": "localhost"}, {"advertise": "a.host.name"}])
def test_an_address_that_peers_cannot_use_is_refused(kind: dict[str, str]) -> None:
    transport = HttpTransport(**kind)  # type: ignore[arg-type]  # only strings are passed here
    with pytest.raises(LocalProtocolError):
        _ = transport.address
    transport.close()


def test_a_port_in_use_is_a_transport_error() -> None:
    handle = msgspec.msgpack.encode(HttpHandle(bytes(16)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        transport = HttpTransport(port=taken.getsockname()[1])
        for begin in (lambda: transport.address, lambda: transport.connect(handle)):
            with pytest.raises(TransportError, match="listen"):
                begin()
    transport.close()
    with pytest.raises(LocalProtocolError):
        transport.connect(handle)
