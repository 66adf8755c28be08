"""Requests to the bootstrap server: bytes on a connection, as far as the answer and the table of leases."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.http_server import _Exchange
from embferry.discovery.leases import WorkerList
from embferry.transports.http import heads
from embferry.trust.rates import NetworkRates
from embferry.trust.trust import Trust

from ..doubles import ArrivingSocket, StillLoop, arrivals
from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json, packed

ID = "encode-1"
CONTINUE = b"HTTP/1.1 100 \r\n\r\n"


class RefusedRequestError(Exception):
    """The server has answered with an error, as it should for a malformed request."""


class BootstrapRequests(Target):
    documented = (RefusedRequestError,)
    nesting = (b"[", b"]")
    inputs = 3000
    bounds = Bounds(calls=9000, calls_per_byte=32, memory=256 << 10, memory_per_byte=400)

    def tree(self, chance: Random) -> Tree:
        return [chance.choice(REQUESTS)(chance), ["Host: 192.0.2.1\r\n"], {}]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        line, fields, body = (*tree, [], [], {})[:3]
        if isinstance(line, list) and len(line) > 1 and isinstance(line[-1], dict):
            line, body = line[:-1], line[-1]
        content = as_json(body) if body else b""
        head = [line, " HTTP/1.1\r\n", fields, f"Content-Length: {len(content)}\r\n\r\n"]
        stream = packed(head) + content
        return arrivals(stream, [chance.randrange(len(stream) + 1) for _ in range(chance.randrange(3))])

    def run(self, pieces: Pieces) -> None:
        server, sock = _Server(), ArrivingSocket(pieces)
        exchange = _Exchange(sock, "192.0.2.1", server)  # type: ignore[arg-type]
        exchange.start()
        while not sock.closed and sock.arrive():
            while sock.has_bytes and not sock.closed:
                exchange.receive_now() if not exchange._answered else sock.recv(1 << 16)
        listed = server.bootstrap._answer("GET", "/workers", b"").content
        workers, dropped = msgspec.json.decode(msgspec.json.encode(listed), type=WorkerList).read()
        assert not dropped, "a lease that no client can use"
        assert workers == server.bootstrap.workers(), "the client sees other workers than the server"
        request = exchange._request
        _check_answer(bytes(sock.sent), has_body=request is None or request.method != "HEAD")


class _Server:
    """The part of a server that an exchange needs; the handler is the real one."""

    def __init__(self) -> None:
        self.bootstrap = BootstrapServer(trust=Trust(), clock=lambda: 0.0)
        self.handler, self.guard, self.loop = self.bootstrap._answer, self.bootstrap._guard, StillLoop()
        self.rates = NetworkRates(1.0, 1.0, is_exempt=lambda address: True)
        self.unsent_bytes = 0

    def count_unsent(self, count: int) -> None:
        self.unsent_bytes += count

    def forget(self, exchange: Any) -> None: ...


def _check_answer(sent: bytes, *, has_body: bool) -> None:
    """Checks that one well-formed answer was sent, and no failure of the server.

    Raises:
        RefusedRequestError: It reports an error, or the request is not complete.
    """
    head, _, body = sent.removeprefix(CONTINUE).partition(heads.END)
    if not head:
        raise RefusedRequestError("the request is not complete")
    answer = heads.parse_response(head)
    assert answer.status < 500 or answer.status == 503, f"a request makes the server fail: {body!r}"
    assert not has_body or heads.content_length(answer.headers) == len(body), "the body has another length"
    if answer.status >= 400:
        raise RefusedRequestError(body.decode())


def _worker(chance: Random) -> dict[str, Tree]:
    rank = {"tp_size": 4, "dp_size": 2, "rank_ip": "10.0.0.1", "rank_port": 9, "engine_rank": chance.randrange(4)}
    worker: dict[str, Tree] = {"id": ID, "role": "encode", "url": "http://10.0.0.1:1", "endpoint": "tcp://10.0.0.1:2"}
    return worker | {"model": "m", "load": 1.5, "rank": chance.choice((None, rank))}


def _route(chance: Random) -> dict[str, Tree]:
    return {"role": "Encode", "tp_size": 4, "dp_size": 2, "rank_ip": "h", "rank_port": 9, "engine_rank": 1}


REQUESTS = (
    lambda chance: ["PUT", " ", ["/workers/", ID], _worker(chance)],
    lambda chance: ["PUT", " ", "/route", _route(chance)],
    lambda chance: ["GET", " ", ["/workers", "?role=", chance.choice(("encode", "language"))]],
    lambda chance: ["GET", " ", chance.choice(("/health", "/metrics"))],
)
