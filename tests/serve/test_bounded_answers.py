"""Each caller of another part refuses answers that are encoded or have no end, before it has spent memory."""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
from pathlib import Path

import httpx
import pytest

import embferry
from embferry.serve.config import RouterSettings, Settings, VllmSettings
from embferry.serve.http.proofs import ProvedRequests
from embferry.serve.router.fleet import Fleet
from embferry.serve.vllm.fleet import Fleet as VllmFleet
from embferry.trust.bounded_answers import bounded_client
from embferry.trust.digests import LINES
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.requests import BOOTSTRAP
from tests.plain_server import SECONDS, PlainServer
from tests.serve.fakes import Deployment
from tests.serve.test_proofs import BODY

pytestmark = pytest.mark.integration

BOMB = gzip.compress(bytes(50 << 20), 9)
"""50 kB that are 50 MiB when they are unpacked."""
PIECE = bytes(1 << 20)
MOST_BYTES = 100 << 20
"""More than any caller takes of an answer, together with what the kernel holds."""


class Liar(PlainServer):
    """A server whose every answer is a bomb, or has no end.

    Attributes:
        url: Where it is.
        sent: Bytes of the longest answer so far.
        asked: Heads of the requests.
    """

    def __init__(self, head: str, *, bomb: bool) -> None:
        self.sent, self.asked = 0, list[bytes]()
        self._head, self._bomb = f"HTTP/1.1 {head}\r\n".encode(), bomb
        super().__init__()
        self.url = f"http://127.0.0.1:{self.port}"

    def serve(self, client: socket.socket) -> None:
        sent = 0
        try:
            self.asked.append(client.recv(1 << 16))
            if self._bomb:
                head = self._head + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB)
                client.sendall(head + BOMB)
                client.recv(1)
            else:
                client.sendall(self._head + b"Connection: close\r\n\r\n")
                while sent < MOST_BYTES:
                    client.sendall(PIECE)
                    sent += len(PIECE)
        except OSError:
            pass
        self.sent = max(self.sent, sent)


WHOLE = "200 OK\r\nContent-Type: application/json\r\nContent-Digest: sha-256=:AAAA:"
ERROR = "503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Digest: sha-256=:AAAA:"
CHALLENGE = '401 Unauthorized\r\nWWW-Authenticate: Embferry nonce="' + 32 * "0" + '", reason="proof_required"'
LINED = f"200 OK\r\nContent-Type: {LINES}"
EVENTS = "200 OK\r\nContent-Type: text/event-stream"

heads = pytest.mark.parametrize("head", [WHOLE, ERROR, LINED, EVENTS], ids=["whole", "error", "lines", "events"])
kinds = pytest.mark.parametrize("bomb", [True, False], ids=["bomb", "endless"])


def is_refused(liar: Liar, text: str) -> bool:
    """Returns whether a text says why an answer was refused. The liar must have found its client gone."""
    assert liar.sent < MOST_BYTES
    assert all(b"\r\naccept-encoding: identity\r\n" in asked.lower() for asked in liar.asked)
    return "Content-Encoding" in text or re.search(r"more than [0-9,]+ bytes", text) is not None


@heads
@kinds
def test_a_bootstrap_server_that_lies_is_refused(head: str, bomb: bool) -> None:
    async def trouble(url: str) -> str:
        fleet = Fleet(Settings(bootstrap_url=url, router=RouterSettings(connect_timeout=SECONDS)))
        await fleet.refresh()
        await fleet.close()
        return fleet._trouble

    with Liar(head, bomb=bomb) as liar:
        said = asyncio.run(trouble(liar.url))
    assert is_refused(liar, said)


@heads
@kinds
def test_an_instance_of_vllm_that_lies_is_refused(head: str, bomb: bool) -> None:
    async def trouble(url: str) -> str:
        fleet = VllmFleet(Settings(vllm=VllmSettings(encode_urls=(url,), language_urls=(url,))))
        await fleet._probe(fleet.encoders[0])
        await fleet.close()
        return fleet.encoders[0].trouble

    with Liar(head, bomb=bomb) as liar:
        said = asyncio.run(trouble(liar.url))
    assert is_refused(liar, said)


@pytest.mark.parametrize("role", ["encode", "language"])
@pytest.mark.parametrize("head", [WHOLE, ERROR, LINED], ids=["whole", "error", "lines"])
@kinds
def test_a_worker_that_lies_is_refused(deployment: Deployment, role: str, head: str, bomb: bool) -> None:
    url = f"{deployment.url}/v1/chat/completions"
    with Liar(head, bomb=bomb) as liar, httpx.Client(timeout=SECONDS, trust_env=False) as http:
        names = {"encode": "encode0", "language": "language0"}
        deployment.workers = [
            deployment.entry(name, **({"id": "liar", "url": liar.url} if kind == role else {}))
            for kind, name in names.items()
        ]
        deployment.wait(lambda: http.post(url, json=BODY).status_code != 200)
        answer = http.post(url, json=BODY)
    assert answer.status_code in (502, 503)
    assert is_refused(liar, answer.text)


@kinds
def test_a_challenge_that_lies_is_refused(bomb: bool) -> None:
    """Httpx reads an answer that asks for another proof before it sends the next request."""

    async def ask(url: str) -> str:
        prover = ProvedRequests(ClusterKeys(Key.new()), BOOTSTRAP, url)
        async with bounded_client(limits=httpx.Limits()) as client:
            with pytest.raises(httpx.ReadError) as caught:
                await client.get(url, auth=prover)
        return str(caught.value)

    with Liar(CHALLENGE, bomb=bomb) as liar:
        said = asyncio.run(ask(liar.url))
    assert is_refused(liar, said)


def test_no_cookie_of_another_part_is_kept() -> None:
    async def ask() -> list[str | None]:
        asked: list[str | None] = []

        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(request.headers.get("cookie"))
            return httpx.Response(200, headers={"Set-Cookie": "a=b; Path=/"}, stream=httpx.ByteStream(b""))

        async with bounded_client(limits=httpx.Limits(), transport=httpx.MockTransport(answer)) as client:
            for _ in range(2):
                await client.get("http://worker.example/")
            assert len(client.cookies.jar) == 0
        return asked

    assert asyncio.run(ask()) == [None, None]


FOREIGN = {"serve/media/fetch.py", "cli/ask.py", "cli/ui.py", "bench", "plan/measuring.py", "trust/bounded_answers.py"}
"""Callers of servers of others or of the user, and the module that makes the clients of all others."""


def test_every_client_of_another_part_is_bounded() -> None:
    package = Path(embferry.__file__).parent
    made = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"httpx\.(Async)?Client\(|httpx\.(get|post|put|delete|request|stream)\(", path.read_text())
    }
    assert {path for path in made if not any(path.startswith(one) for one in FOREIGN)} == set()
