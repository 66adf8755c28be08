"""Many clients send the largest body that is allowed and leave: a client that stays waits for no work of theirs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from embferry.serve import off_loop
from embferry.serve.http import body as body_module
from embferry.serve.media.fetch import Fetcher
from embferry.serve.router.chat import Chat
from tests.serve import pictures
from tests.serve.blocking import Blocking
from tests.serve.conftest import user
from tests.serve.fakes import DEADLINE, Deployment
from tests.serve.pictures import data_url

pytestmark = pytest.mark.integration

LARGEST = 2 * off_loop.LARGE_BYTES
LEAVERS = 12
SETTINGS = {"max_body_bytes": LARGEST, "request_timeout": 10 * DEADLINE}
WORK: dict[str, tuple[Any, str]] = {
    "json": (Chat, "_parsed"),
    "base64": (Fetcher, "_inline"),
    "digest": (body_module, "check_foreign_content"),
}


def request(text: str, has_digest: bool) -> bytes:
    """Returns a request with a body of the largest size, most of it base64."""
    url = "data:image/png;base64,"
    body = {"model": "shapes", "messages": user({"type": "image_url", "image_url": {"url": url}}, text)}
    room = LARGEST - len(json.dumps(body))
    body["messages"][0]["content"][0]["image_url"]["url"] = url + "A" * (room // 4 * 4)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: router\r\nContent-Length: {len(content)}\r\n"
    if has_digest:
        head += f"Content-Digest: sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:\r\n"
    return f"{head}\r\n".encode() + content


class Clients:
    """Clients with an address each, as far as the router can see.

    Args:
        deployment: the router.
        digests: the clients send the digest of their bodies, whose check is one more piece of work.
    """

    def __init__(self, deployment: Deployment, *, digests: bool) -> None:
        self._url, self._digests = urlsplit(deployment.url), digests

    def ask(self, address: str) -> socket.socket:
        client = socket.create_connection((self._url.hostname or "", self._url.port or 0), source_address=(address, 0))
        client.sendall(request(address, self._digests))
        return client


@pytest.mark.parametrize("deployment", [SETTINGS], indirect=True)
@pytest.mark.parametrize("addresses", [1, LEAVERS])
@pytest.mark.parametrize("work", WORK)
def test_a_client_waits_for_no_work_of_those_that_have_left(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, work: str, addresses: int
) -> None:
    owner, name = WORK[work]
    blocking, threads = Blocking(getattr(owner, name)), off_loop._THREADS
    monkeypatch.setattr(owner, name, lambda *arguments: blocking(*arguments))
    clients = Clients(deployment, digests=work == "digest")
    try:
        with contextlib.ExitStack() as leaving:
            for number in range(LEAVERS):
                leaving.enter_context(clients.ask(f"127.0.1.{1 + number % addresses}"))
            deployment.wait(lambda: blocking.calls == off_loop.JOBS and threads.waiting == LEAVERS - off_loop.JOBS)
        deployment.wait(lambda: threads.waiting == 0)
        with clients.ask("127.0.2.1") as stayer:
            deployment.wait(lambda: threads.waiting == 1)
            blocking.release.set()
            assert stayer.recv(1)
    finally:
        blocking.release.set()
    assert blocking.calls == off_loop.JOBS + 1


@pytest.mark.parametrize("deployment", [SETTINGS], indirect=True)
def test_a_client_waits_for_one_body_of_another_client_however_many_that_sends(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    blocking, threads = Blocking(Chat._parsed), off_loop._THREADS

    def parsed(chat: Chat, body: bytes, *others: Any) -> Any:
        order.append("other" if b"127.0.2.1" in body else "first")
        return blocking(chat, body, *others)

    monkeypatch.setattr(Chat, "_parsed", parsed)
    clients = Clients(deployment, digests=False)
    with contextlib.ExitStack() as held:
        for _ in range(LEAVERS):
            held.enter_context(clients.ask("127.0.1.1"))
        deployment.wait(lambda: len(order) == off_loop.JOBS and threads.waiting == LEAVERS - off_loop.JOBS)
        other = held.enter_context(clients.ask("127.0.2.1"))
        deployment.wait(lambda: threads.waiting == LEAVERS - off_loop.JOBS + 1)
        blocking.release.set()
        assert other.recv(1)
    assert "other" in order[: 2 * off_loop.JOBS], "those that had begun, and one at most in each thread"


def test_both_workers_hear_whose_request_it_is(deployment: Deployment) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(pictures.png(8, 8))}}
    its_own = httpx.HTTPTransport(local_address="127.0.3.1")
    with httpx.Client(transport=its_own, base_url=deployment.url, timeout=DEADLINE) as client:
        client.post("/v1/chat/completions", json={"model": "shapes", "messages": user(picture, "?")})
    for worker in ("encode0", "language0"):
        (request,) = deployment.fakes[worker].requests
        assert request["client"] == "address 127.0.3.1"
