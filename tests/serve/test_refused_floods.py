"""Connections full of requests that are refused: each takes its time, so that they do not keep others waiting."""

from __future__ import annotations

from typing import Any

import pytest

from embferry.serve.http import connections
from tests.serve.test_connections import Server, answer, ask

pytestmark = pytest.mark.asyncio

REQUEST = b"GET /refused HTTP/1.1\r\nHost: x\r\n\r\n"


class Refusing(Server):
    """A server that refuses everything but ``/`` with a status. ``asked``: how often it has."""

    def __init__(self, status: int) -> None:
        super().__init__(connections=20, per_address=20)
        self.status, self.asked = status, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/":
            await super().__call__(scope, receive, send)
            return
        self.asked += 1
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize(("status", "is_held"), [(401, True), (429, True), (404, False)])
async def test_the_next_request_after_a_refusal_waits(
    monkeypatch: pytest.MonkeyPatch, status: int, is_held: bool
) -> None:
    monkeypatch.setattr(connections, "REFUSED_SECONDS", 1e6)
    async with Refusing(status).running() as server:
        assert isinstance(server, Refusing)
        full, other = await server.connect(), await server.connect()
        full[1].write(REQUEST * 100)
        await answer(full)
        for _ in range(100):
            ask(other)
            await answer(other)
        assert server.asked == (1 if is_held else 100)


async def test_a_client_that_reads_the_refusal_may_ask_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As parts do, which learn from the first refusal what to prove."""
    monkeypatch.setattr(connections, "REFUSED_SECONDS", 1e6)
    async with Refusing(401).running() as server:
        connection = await server.connect()
        for _ in range(3):
            connection[1].write(REQUEST)
            await answer(connection)
        assert server.asked == 3  # type: ignore[attr-defined]


async def test_it_is_taken_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REFUSED_SECONDS", 0.001)
    async with Refusing(401).running() as server:
        connection = await server.connect()
        connection[1].write(REQUEST * 3)
        for _ in range(3):
            await answer(connection)
        assert server.asked == 3  # type: ignore[attr-defined]
