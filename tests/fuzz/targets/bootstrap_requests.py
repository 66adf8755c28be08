"""Requests to the bootstrap server: bytes on a connection, as far as the answer and the table of leases."""

from __future__ import annotations

from random import Random
from typing import Any

import h11
import msgspec

from embferry.discovery.bootstrap_client import _Workers
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.http_server import _Exchange

from ..doubles import ArrivingSocket, StillLoop, arrivals
from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json, packed

ID = "encode-1"


class RefusedRequestError(Exception):
    """The server has answered with an error, as it should for a malformed request."""


class BootstrapRequests(Target):
    documented = (RefusedRequestError,)
    nesting = (b"[", b"]")
    inputs = 3000
    bounds = Bounds(calls=9000, calls_per_byte=32, memory=256 << 10)

    def tree(self, chance: Random) -> Tree:
        return [chance.choice(REQUESTS)(chance), ["Host: 192.0.2.1\r\n"], {}]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        line, fields, body = (*tree, [], [], {})[:3]
        if isinstance(line, list) and len(line) > 1 and isinstance(line[-1], dict):
            line, body = line[:-1], line[-1]
        content = as_json(body) if body else b""
        length = len(content) + (chance.random() < 0.03) * chance.randrange(-5, 5)
        head = [line, " HTTP/1.1\r\n", fields, f"Content-Length: {length}\r\n\r\n"]
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
        workers = msgspec.json.decode(msgspec.json.encode(listed), type=_Workers).workers
        assert workers == server.bootstrap.workers(), "the client sees other workers than the server"
        for body in filter(None, _bodies(bytes(sock.sent))):
            raise RefusedRequestError(body.decode())


class _Server:
    """What an exchange needs of its server; the handler is the real one."""

    def __init__(self) -> None:
        self.bootstrap = BootstrapServer(clock=lambda: 0.0)
        self.handler, self.loop = self.bootstrap._answer, StillLoop()
        self.unsent_bytes = 0

    def count_unsent(self, count: int) -> None:
        self.unsent_bytes += count

    def forget(self, exchange: Any) -> None: ...


def _bodies(sent: bytes) -> list[bytes]:
    """Returns the body of each answer with an error, and an empty text for others; all must be well-formed."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(sent)
    client.receive_data(b"")
    found, status = [], 0
    while not isinstance(event := client.next_event(), h11.ConnectionClosed | type(h11.NEED_DATA) | type(h11.PAUSED)):
        if isinstance(event, h11.Response):
            status = event.status_code
            assert status != 500, "a request makes the server fail"
        if isinstance(event, h11.Data):
            found.append(bytes(event.data) if status >= 400 else b"")
        if isinstance(event, h11.EndOfMessage):
            break
    return found


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
