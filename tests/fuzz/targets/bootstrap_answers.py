"""The answer of a bootstrap server, as its client reads it."""

from __future__ import annotations

from random import Random
from typing import Any

import h11

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.http_client import Response, _Answer
from embferry.discovery.leases import Worker
from embferry.protocol.errors import (
    CapacityError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
)
from embferry.trust.trust import Trust

from ..doubles import arrivals
from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json, packed

ASKED = (
    lambda client: client.workers(),
    lambda client: client.register(Worker(id="a", role="encode")),
    lambda client: client.route(0),
    lambda client: client.shape(),
    lambda client: client.remove("a"),
)
"""The requests that may have been made. Every answer is tried as the answer to each."""


class BootstrapAnswers(Target):
    documented = (TransportError, RemoteProtocolError, LocalProtocolError, CapacityError, PeerGone)
    nesting = (b"[", b"]")
    inputs = 3000
    bounds = Bounds(calls=20_000, calls_per_byte=32, memory=256 << 10, memory_per_byte=400)

    def tree(self, chance: Random) -> Tree:
        worker = {"id": "a", "role": "encode", "url": "http://h:1", "load": 2.0, "rank": None}
        content = chance.choice(
            (
                {"workers": [worker] * chance.randrange(3), "complete": True},
                {"lease_seconds": 5.0, "new": True},
                {"rank_ip": "10.0.0.1", "rank_port": 9},
                {"embedding_tp_size": 4, "embedding_dp_size": 2},
                {"error": {"code": "unknown_worker", "message": "no worker"}},
            )
        )
        status = 404 if "error" in content else 200
        return [["HTTP/1.1", " ", str(status), " ", "OK", "\r\n"], ["Connection: close", "\r\n"], content]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        line, fields, content = (*tree, [], [], {})[:3]
        body = as_json(content)
        stream = packed([line, fields, f"Content-Length: {len(body)}\r\n\r\n", body])
        return arrivals(stream, [chance.randrange(len(stream) + 1) for _ in range(chance.randrange(3))])

    def run(self, pieces: Pieces) -> None:
        errors = []
        for ask in ASKED:
            try:
                ask(_Client(pieces))
            except self.documented as error:
                errors.append(error)
        if len(errors) == len(ASKED):
            raise errors[0]


class _Client(BootstrapClient):
    """Gets the pieces as the answer to each of its requests."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__("http://192.0.2.1:1", trust=Trust())
        self._pieces = pieces

    def _send(self, *request: Any) -> Response:
        answer = _Answer()
        head = h11.Request(method=request[0], target=request[1], headers=[("Host", "a"), ("Content-Length", "0")])
        answer.http.send(head)
        answer.http.send(h11.EndOfMessage())
        try:
            for piece in [*self._pieces, b""]:
                if not answer.complete:
                    answer.receive(piece)
        except (h11.RemoteProtocolError, OSError) as error:
            raise RemoteProtocolError(str(error)) from error
        if not answer.complete:
            raise TransportError("it did not answer in time")
        return answer.response
