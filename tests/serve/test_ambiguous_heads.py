"""Requests whose head two programs may read differently, at every HTTP server of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.serve.worker.http import worker_app
from embferry.trust.trust import Trust
from tests.serve.fakes import Deployment
from tests.serve.test_tls import Served
from tests.strangers.raw_http import send

pytestmark = pytest.mark.integration

Address = tuple[str, int]
NEXT = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
"""A second request on the same connection."""
AMBIGUOUS = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\ncontent-length: 30\r\n\r\n0\r\n\r\n",
    b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\nContent-Length: 0\r\n\r\n",
    b"Authorization: Bearer a\r\nauthorization: Bearer a\r\nContent-Length: 0\r\n\r\n",
]


@pytest.fixture
def bootstrap() -> Iterator[Address]:
    with BootstrapServer(trust=Trust()) as server:
        yield "127.0.0.1", server.port


@pytest.fixture
def worker() -> Iterator[Address]:
    service: Any = SimpleNamespace(fault=None, load=0)
    with Served(worker_app(service, []), clients=False) as server:
        yield address_in(server.url)


@pytest.fixture
def router(deployment: Deployment) -> Address:
    return address_in(deployment.url)


@pytest.fixture(params=["router", "worker", "bootstrap"])
def server(request: pytest.FixtureRequest) -> Address:
    at: Address = request.getfixturevalue(request.param)
    return at


def address_in(url: str) -> Address:
    return "127.0.0.1", int(url.rpartition(":")[2])


@pytest.mark.parametrize("head", AMBIGUOUS)
@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/nothing", b"/health"])
def test_an_ambiguous_request_gets_400_and_nothing_after_it_is_read(server: Address, path: bytes, head: bytes) -> None:
    answer = send(server, b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + head + NEXT, shuts=False)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"code":"invalid_request"' in answer


def test_a_router_names_the_ambiguous_request(router: Address) -> None:
    answer = send(router, b"POST / HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n" + AMBIGUOUS[0], shuts=False)
    assert b"x-request-id: mine" in answer.lower()
