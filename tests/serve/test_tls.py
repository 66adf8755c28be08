"""HTTP of router and workers over TLS, without a model: the real server and the router's own client."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import threading
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from embferry.serve.config import Settings
from embferry.serve.http.address import get, url_of
from embferry.serve.http.serving import listen, serve_app
from embferry.serve.router.fleet import Fleet
from embferry.trust import Trust
from embferry.trust.tls import Tls, dialling_with
from embferry.trust.trust import TLS_ENV
from tests.trust.authority import Authority

pytestmark = pytest.mark.integration

SECONDS = 60.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> tuple[Path, Path, Path]:
    return authority.files("part")


@pytest.fixture
def environment(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in zip(TLS_ENV, files, strict=True):
        monkeypatch.setenv(name, str(path))


class Served:
    """A server on a thread of its own."""

    def __init__(self, app: ASGIApp | None = None, *, clients: bool, behind_proxy: bool = False) -> None:
        trust = Trust.of_environment()
        self._listener = listen("127.0.0.1", 0)
        self.url = url_of("127.0.0.1", self._listener, trust.scheme)
        self._started, self._is_over = threading.Event(), False
        certificate = trust.http_certificate(clients=clients)

        async def health(request: Request) -> Response:
            return PlainTextResponse("ok")

        served = app or Starlette(routes=[Route("/health", health), Route("/workers", health)])

        def serve() -> None:
            asyncio.run(
                serve_app(
                    served,
                    self._listener,
                    self._started.set,
                    is_broken=lambda: self._is_over,
                    certificate=certificate,
                    behind_proxy=behind_proxy,
                )
            )

        self._thread = threading.Thread(target=serve)

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._started.wait(SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join(SECONDS)
        self._listener.close()
        assert not self._thread.is_alive()


async def fetched(fleet: Fleet, url: str) -> httpx.Response:
    response = await fleet.client.get(f"{url}/health")
    response.raise_for_status()
    return response


@pytest.fixture
def settings() -> Settings:
    return Settings(bootstrap_url="https://127.0.0.1:1")


def test_the_routers_client_and_a_worker_verify_each_other(environment: None, settings: Settings) -> None:
    async def ask(url: str) -> str:
        fleet = Fleet(settings)
        try:
            return (await fetched(fleet, url)).text
        finally:
            await fleet.close()

    with Served(clients=True) as server:
        assert server.url.startswith("https://")
        assert asyncio.run(ask(server.url)) == "ok"
        assert get(server.url, "/health", SECONDS) == (200, b"ok")


def test_a_client_without_a_certificate_enters_the_router_only(
    environment: None, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    context = dialling_with(authority.ca)
    with Served(clients=False) as router:
        assert httpx.get(f"{router.url}/health", verify=context, trust_env=False, timeout=SECONDS).text == "ok"
    with Served(clients=True) as worker, caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{worker.url}/health", verify=context, trust_env=False, timeout=SECONDS)
    lines = [line for line in caplog.messages if "refused a connection" in line]
    port, why = worker.url.rpartition(":")[2], "the other end has shown no certificate"
    assert lines == [f"port {port} refused a connection of 127.0.0.1: the TLS handshake failed: {why}"]


def test_plain_text_is_refused_and_logged(
    environment: None, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with Served(clients=True) as worker, caplog.at_level(logging.WARNING), pytest.raises(httpx.TransportError):
        httpx.get(worker.url.replace("https", "http"), trust_env=False, timeout=SECONDS)
    assert any("the other end does not speak TLS" in line for line in caplog.messages)


def test_a_certificate_is_renewed_for_client_and_server(
    environment: None, authority: Authority, files: tuple[Path, Path, Path], settings: Settings
) -> None:
    def serial(url: str) -> object:
        address = httpx.URL(url)
        with (
            socket.create_connection((address.host, address.port or 0), timeout=SECONDS) as sock,
            Tls(*files).dialling().wrap_socket(sock, server_hostname=address.host) as stream,
        ):
            return (stream.getpeercert() or {})["serialNumber"]

    async def before_and_after(server: Served) -> tuple[object, object]:
        fleet = Fleet(settings)
        try:
            await fetched(fleet, server.url)
            before = serial(server.url)
            _, cert, key = authority.files("next")
            os.replace(key, authority.path / "part.key")
            os.replace(cert, authority.path / "part.pem")
            after = serial(server.url)
            await fetched(fleet, server.url)
            return before, after
        finally:
            await fleet.close()

    with Served(clients=True) as server:
        before, after = asyncio.run(before_and_after(server))
    assert before != after


def test_a_client_that_does_not_know_the_ca_is_told(environment: None, tmp_path: Path) -> None:
    with Served(clients=False) as router:
        other = dialling_with(Authority.make(tmp_path).ca)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            httpx.get(f"{router.url}/health", verify=other, trust_env=False, timeout=SECONDS)
        assert isinstance(caught.value.__context__, Exception)
        assert not isinstance(caught.value, ssl.SSLError)
