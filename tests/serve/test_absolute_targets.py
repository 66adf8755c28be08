"""Requests whose target is a whole URL are those for its path."""

from __future__ import annotations

import pytest

from embferry.serve.router.app import build
from tests.serve.fakes import Deployment
from tests.serve.test_tls import Served
from tests.strangers.raw_http import request, send, status_of

pytestmark = pytest.mark.integration


def status(deployment: Deployment, target: str) -> int:
    """Returns the status of a router's answer."""
    with Served(build(deployment.settings), clients=False) as served:
        return status_of(send(("127.0.0.1", int(served.url.rpartition(":")[2])), request("GET", target), shuts=False))


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("http://x/health", 200),
        ("HTTPS://user@x:80/health", 200),
        ("http://[::1]:5/health?a=http://y/nothing", 200),
        ("http://x/%68ealth", 200),
        ("http://x", 200),
        ("http://x?/health", 200),
        ("http://x/nothing", 404),
        ("http://x/http://y/health", 404),
        ("http:///health", 404),
        ("/http://x/health", 404),
        ("ftp://x/health", 404),
    ],
)
def test_a_whole_url_is_asked_for_by_its_path(deployment: Deployment, target: str, wanted: int) -> None:
    assert status(deployment, target) == wanted


@pytest.mark.parametrize("deployment", [{"api_key": "secret"}], indirect=True)
@pytest.mark.parametrize("target", ["/workers", "http://x/workers", "http://x/v1/models"])
def test_it_needs_the_key_that_its_path_needs(deployment: Deployment, target: str) -> None:
    assert status(deployment, target) == 401
