"""The bound on the connections of an HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from embferry.serve.http import connections
from embferry.serve.http.connections import ConnectionLimits, bounded_protocol
from embferry.serve.http.descriptors import ExceptionHandler

pytestmark = pytest.mark.asyncio

DEADLINE = 60.0
MOST = 2
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """A server that answers ``/`` at once, and anything else when ``release`` is set."""

    def __init__(self, **limits: Any) -> None:
        self.limits = ConnectionLimits(**{"connections": MOST, "per_address": MOST} | limits)
        self.release = asyncio.Event()
        self.working = 0
        self._made: list[Connection] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/":
            self.working += 1
            await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        config = uvicorn.Config(
            self, http=bounded_protocol(self.limits), ws="none", log_config=None, access_log=False, lifespan="off"
        )
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        await server.startup(sockets=[listener])
        try:
            async with asyncio.timeout(DEADLINE):
                yield self
        finally:
            self.release.set()
            for each in server.servers:
                each.close()
            for _, writer in self._made:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
            while server.server_state.connections:
                await asyncio.sleep(0.001)

    async def connect(self, source: str = "127.0.0.1") -> Connection:
        self._made.append(await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0)))
        return self._made[-1]


def ask(connection: Connection, path: str = "/") -> None:
    connection[1].write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


async def answer(connection: Connection) -> bytes:
    return await connection[0].readuntil(b"\r\n\r\nok")


async def end(connection: Connection) -> bytes:
    """Returns what is left on a connection that the server closes."""
    try:
        return await connection[0].read()
    except ConnectionResetError:
        return b""


async def test_the_connection_that_is_idle_longest_makes_room() -> None:
    async with Server().running() as server:
        first = await server.connect()
        ask(first)
        await answer(first)
        second = await server.connect()
        ask(second)
        await answer(second)
        ask(first)
        await answer(first)  # so the second one has been idle for longer
        third = await server.connect()
        ask(third)
        await answer(third)
        assert await end(second) == b""
        ask(first)
        await answer(first)


async def test_connections_without_a_request_make_room() -> None:
    async with Server().running() as server:
        silent = [await server.connect() for _ in range(20)]
        silent[-1][1].write(b"GET / HT")  # a head that does not end
        asking = await server.connect()
        ask(asking)
        await answer(asking)
        for connection in silent[:-1]:
            assert await end(connection) == b""


async def test_a_connection_is_refused_while_all_are_in_use() -> None:
    async with Server().running() as server:
        busy = [await server.connect() for _ in range(MOST)]
        for connection in busy:
            ask(connection, "/slow")
        while server.working < MOST:
            await asyncio.sleep(0.001)
        assert await end(await server.connect()) == b""
        server.release.set()
        for connection in busy:
            await answer(connection)
        another = await server.connect()
        ask(another)
        await answer(another)


async def test_a_first_request_that_does_not_arrive_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.01)
    async with Server().running() as server:
        silent, slow = await server.connect(), await server.connect()
        slow[1].write(b"GET / HTTP/1.1\r\nHost: ")
        assert await end(silent) == b""
        assert await end(slow) == b""


async def test_a_lack_of_open_files_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    loop, handler = asyncio.get_running_loop(), ExceptionHandler()
    shortage = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "none left")}
    with caplog.at_level(logging.ERROR):
        for _ in range(1000):
            handler(loop, shortage)
        assert len(caplog.records) == 1
        handler(loop, {"message": "something else", "exception": ValueError()})
        assert len(caplog.records) == 2
