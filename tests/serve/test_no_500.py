"""No request that a client can write makes the router fail: 500 is for bugs alone."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given

from embferry.serve.router.app import build
from tests.serve import odd_requests
from tests.serve.inside import Inside
from tests.serve.odd_requests import EXAMPLES, RAW, URLS, WHOLE, changed, without_network


@pytest.fixture
def asked() -> Iterator[Any]:
    """A function that posts a body to the router, where media may come from any host, of which none is found."""
    deployment = Inside(media={"allowed_hosts": ("*",)})
    with without_network(), asyncio.Runner() as runner:
        app = build(deployment.settings, httpx.ASGITransport(deployment._app()))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")

        def ask(path: str, content: bytes, **headers: str) -> httpx.Response:
            return runner.run(client.post(path, content=content, headers=headers))

        yield ask
        runner.run(client.aclose())
    deployment.close()


def check(response: httpx.Response) -> None:
    odd_requests.check(response.status_code, response.content)


@EXAMPLES
@given(changed())
def test_a_changed_request_is_answered_or_refused(asked: Any, sent: tuple[str, bytes]) -> None:
    path, body = sent
    check(asked(path, body))


@pytest.mark.parametrize("body", RAW, ids=repr)
@pytest.mark.parametrize("path", WHOLE)
def test_a_body_that_is_no_request_is_refused(asked: Any, path: str, body: bytes) -> None:
    response = asked(path, body)
    check(response)
    assert response.status_code == 400


@pytest.mark.parametrize("url", URLS, ids=lambda url: url[:20].encode("ascii", "backslashreplace").decode())
@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_a_url_that_is_none_is_refused(asked: Any, kind: str, url: str) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]}
    response = asked("/v1/chat/completions", json.dumps(body).encode())
    check(response)
    assert response.status_code in (400, 403)
    assert response.json()["error"]["param"].startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-encoding": "gzip"}, {"content-digest": "x"}, {"content-length": "9" * 400},
        {"x-request-id": "\\xfc\\n"}, {"authorization": "Bearer"}, {"x-forwarded-for": "x"},
        {"content-type": "multipart/form-data"}, {"embferry-digest": "0"}, {"origin": "null"},
    ],
    ids=repr,
)  # fmt: skip
def test_headers_that_are_odd(asked: Any, headers: dict[str, str]) -> None:
    check(asked("/v1/chat/completions", json.dumps(WHOLE["/v1/chat/completions"]).encode(), **headers))
    check(asked("/v1/chat/completions", gzip.compress(b"{"), **headers))


@pytest.mark.parametrize(
    "path", ["/v1/models/" + "9" * 5000, "/%00", "/v1/chat/completions/", "/v1//models", "/é", "/%ff"]
)
def test_paths_that_there_are_not(asked: Any, path: str) -> None:
    response = asked(path, b"{}")
    if response.status_code != 307:  # to the path without the slash
        assert response.status_code in (404, 405)
        check(response)
