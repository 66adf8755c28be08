"""The bootstrap server and its client over TLS: who is let in, and what both ends are told."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h11
import pytest

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.http_client import exchange
from embferry.discovery.http_server import Answer, HttpServer
from embferry.discovery.leases import Worker
from embferry.discovery.server_limits import ServerLimits
from embferry.protocol.errors import LocalProtocolError, TlsFailed, TransportError
from embferry.trust import ClusterKeys, Key, Trust
from embferry.trust.tls import Tls
from tests.trust.authority import Authority

pytestmark = pytest.mark.integration

SECONDS = 60.0
"""Longest time of a call. Far longer than any takes, so that a busy machine does not fail a test."""
WORKER = Worker(id="w", role="encode", url="https://127.0.0.1:1", endpoint="tcp://127.0.0.1:2")
PLAIN = Trust()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@contextmanager
def serving(tls: Tls | None, keys: ClusterKeys | None = None) -> Iterator[BootstrapServer]:
    with BootstrapServer(trust=Trust(keys, tls=tls)) as server:
        yield server


def url_of(server: BootstrapServer, scheme: str, host: str = "127.0.0.1") -> str:
    return f"{scheme}://{host}:{server.port}"


def test_workers_register_over_tls_with_a_key_inside(authority: Authority) -> None:
    keys = ClusterKeys(Key(b"k" * 32))
    with serving(authority.tls("server"), keys) as server:
        assert server.url.startswith("https://")
        client = client_of(server.url, Trust(keys, tls=authority.tls("client")))
        assert client.register(WORKER).new
        assert client.workers() == (WORKER,)
        assert client.healthy()


def test_names_and_addresses_are_verified(authority: Authority) -> None:
    with serving(authority.tls("named", "localhost")) as server:
        trust = Trust(tls=authority.tls("dialler"))
        assert client_of(url_of(server, "https", "localhost"), trust).healthy()
        with pytest.raises(TlsFailed, match="certificate is not accepted: IP address mismatch"):
            client_of(url_of(server, "https"), trust).workers()


def client_of(url: str, trust: Trust) -> BootstrapClient:
    return BootstrapClient(url, trust=trust, timeout_s=SECONDS)


Make = Callable[[Authority, Path], Tls]


def another_ca(authority: Authority, path: Path) -> Tls:
    return Authority.make(path).tls("stranger")


def its_ca_is_mine(authority: Authority, path: Path) -> Tls:
    """A stranger that knows the cluster's CA, and shows a certificate of another one."""
    files = Authority.make(path).files("stranger")
    tls = Tls(*files)
    tls._files.value().dialling.load_verify_locations(authority.ca)
    return tls


@pytest.mark.parametrize(
    ("make", "client_is_told"),
    [
        (another_ca, "the certificate is not accepted"),
        (its_ca_is_mine, "the other end does not know the CA of this end's certificate"),
    ],
)
def test_a_stranger_with_a_certificate_of_another_ca_is_refused(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Make, client_is_told: str
) -> None:
    with serving(authority.tls(f"server-{make.__name__}")) as server, caplog.at_level(logging.WARNING):
        client = client_of(server.url, Trust(tls=make(authority, tmp_path)))
        for _ in range(3):
            with pytest.raises(TlsFailed, match=client_is_told):
                client.register(WORKER)
        assert not server.workers()
    lines = [line for line in caplog.messages if "refused a connection of 127.0.0.1" in line]
    assert len(lines) == 1


def test_plain_text_to_a_tls_port_is_told_to_both(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    told = pytest.raises(TlsFailed, match="the server speaks TLS; write https://")
    with serving(authority.tls("server-plain")) as server, caplog.at_level(logging.WARNING), told:
        client_of(url_of(server, "http"), PLAIN).workers()
    assert any("does not speak TLS" in line for line in caplog.messages)


def test_tls_to_a_plain_port_is_told_to_both(authority: Authority) -> None:
    with serving(None) as server:
        trust = Trust(tls=authority.tls("to-plain"))
        with pytest.raises(TlsFailed, match="the other end does not speak TLS"):
            client_of(url_of(server, "https"), trust).workers()


def test_a_server_that_does_not_require_tls_takes_both(authority: Authority) -> None:
    with serving(authority.tls("both", required=False)) as server:
        assert server.url.startswith("http://")
        assert client_of(url_of(server, "http"), PLAIN).register(WORKER).new
        tls = Trust(tls=authority.tls("both-client"))
        assert client_of(url_of(server, "https"), tls).workers() == (WORKER,)


def test_a_url_that_does_not_fit_is_refused_at_the_start(authority: Authority) -> None:
    with pytest.raises(LocalProtocolError, match="needs a certificate: set EMBFERRY_TLS_CA"):
        client_of("https://127.0.0.1:1", PLAIN)
    with pytest.raises(LocalProtocolError, match="must begin with https://"):
        client_of("http://127.0.0.1:1", Trust(tls=authority.tls("strict")))


def test_a_certificate_is_renewed_while_the_server_runs(authority: Authority) -> None:
    tls = authority.tls("renewed", "localhost")
    with serving(tls) as server:
        trust = Trust(tls=authority.tls("renewal-client"))
        client = client_of(url_of(server, "https"), trust)
        with pytest.raises(TlsFailed):
            client.workers()
        _, cert, key = authority.files("renewed-next", "127.0.0.1")
        os.replace(key, authority.path / "renewed.key")
        os.replace(cert, authority.path / "renewed.pem")
        assert client.workers() == ()


def test_a_client_that_never_ends_its_handshake_is_closed_in_time(authority: Authority) -> None:
    trust = Trust(tls=authority.tls("patient"))
    with BootstrapServer(trust=trust, limits=ServerLimits(request_timeout=0.2)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"\x16\x03\x01\x02")
            began = time.monotonic()
            assert sock.recv(100) == b""
            assert time.monotonic() - began >= 0.1
        client = client_of(server.url, Trust(tls=authority.tls("other")))
        assert client.healthy()


def test_a_long_answer_arrives_whole(authority: Authority) -> None:
    """It does not fit into the kernel's buffers, so the server has to go on when the client has read some of it."""
    content = "0123456789abcdef" * (1 << 17)
    tls = authority.tls("long")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
        port = listener.getsockname()[1]
        server = HttpServer(listener, lambda *_: Answer(content), ServerLimits(), "long answers", tls=tls)
        try:
            request = h11.Request(method="GET", target="/", headers=[("Host", "x")])
            response = exchange("127.0.0.1", port, request, b"", time.monotonic() + 60, tls.dialling())
        finally:
            server.stop()
    assert bytes(response.body) == content.encode()


def test_a_connection_that_is_cut_off_is_retryable(authority: Authority) -> None:
    """A server that accepts and closes: no TLS, but no sign of another protocol either."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = BootstrapClient(
            f"https://127.0.0.1:{listener.getsockname()[1]}", trust=Trust(tls=authority.tls("cut")), timeout_s=0.5
        )
        listener.listen(8)

        def accept() -> None:
            with contextlib.suppress(OSError):  # until it is shut down
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=accept)
        thread.start()
        with pytest.raises(TransportError) as caught:
            client.workers()
        assert caught.value.retryable
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
