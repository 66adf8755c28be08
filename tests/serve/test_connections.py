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
from embferry.serve.http.serving import listen

pytestmark = pytest.mark.asyncio

DEADLINE = 60.0
MOST = 2
KEEP_ALIVE = uvicorn.Config("").timeout_keep_alive
"""Seconds that a connection may be idle after a response, before the time for its next head begins."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """A server that answers ``/`` at once, and anything else when ``release`` is set."""

    def __init__(self, **limits: Any) -> None:
        self.limits = ConnectionLimits(**{"connections": MOST, "per_address": MOST} | limits)
        self.release = asyncio.Event()
        self.working = self.ending = 0
        self._made: list[Connection] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/":
            self.working += 1
            await self.release.wait()
        size = int(dict(scope["headers"]).get(b"x-size", b"2"))
        length = str(size).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": b"ok".ljust(size)})
        self.ending += 1

    async def has_accepted(self, count: int) -> None:
        while self.open < count:
            await asyncio.sleep(0.001)

    @property
    def open(self) -> int:
        return len(self.state.connections)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        config = uvicorn.Config(
            self, http=bounded_protocol(self.limits), ws="none", log_config=None, access_log=False, lifespan="off"
        )
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        await server.startup(sockets=[listener])
        self.state = server.server_state
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
            for left in list(server.server_state.connections):
                left.transport.abort()  # a server that reads nothing does not see that its client has closed
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


async def test_a_kept_connection_has_limited_time_for_its_next_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that trickles in after an answered request keeps no connection, although it is never silent."""
    async with Server().running() as server:
        connection = await server.connect()
        await server.has_accepted(1)
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2 - KEEP_ALIVE)
        ask(connection)
        await answer(connection)
        assert await ended_while_trickling(connection, b"GET / HTTP/1.1\r\nX: ")


async def test_a_refused_body_that_trickles_on_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Server().running() as server:
        monkeypatch.setattr(connections, "REST_SECONDS", 0.2 - KEEP_ALIVE)
        connection = await server.connect()
        connection[1].write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        await answer(connection)
        assert await ended_while_trickling(connection, b"")


async def test_a_response_that_is_not_read_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Server().running() as server:
        connection = await server.connect()
        await server.has_accepted(1)
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2 - KEEP_ALIVE)
        connection[1].transport.pause_reading()  # type: ignore[attr-defined]
        connection[1].write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Size: 30000000\r\nConnection: close\r\n\r\n")
        while not server.ending:
            await asyncio.sleep(0.001)
        while server.open:
            await asyncio.sleep(0.001)


async def test_an_address_has_its_share_of_the_connections() -> None:
    async with Server(connections=4, per_address=2).running() as server:
        mine = [await server.connect() for _ in range(5)]
        another = await server.connect("127.0.0.2")
        for connection in mine[:3]:
            assert await end(connection) == b""
        for connection in (*mine[3:], another):
            ask(connection)
            await answer(connection)


async def test_a_body_that_does_not_end_makes_room_after_idle_connections() -> None:
    async with Server(connections=2).running() as server:
        sending = await server.connect()
        sending[1].write(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
        while server.working < 1:
            await asyncio.sleep(0.001)
        idle, first = await server.connect(), await server.connect()
        assert await end(idle) == b""
        ask(first, "/slow")
        while server.working < 2:
            await asyncio.sleep(0.001)
        second = await server.connect()
        assert await end(sending) == b""
        ask(second)
        await answer(second)


async def test_there_is_room_for_the_fleet() -> None:
    async with Server(connections=2, is_own=lambda address: address == "127.0.0.3").running() as server:
        busy = [await server.connect() for _ in range(2)]
        for connection in busy:
            ask(connection, "/slow")
        while server.working < 2:
            await asyncio.sleep(0.001)
        assert await end(await server.connect()) == b""
        own = await server.connect("127.0.0.3")
        ask(own)
        await answer(own)
        newer = await server.connect("127.0.0.3")
        assert await end(own) == b""  # its own share is bounded as well: the idle one makes room
        ask(newer)
        await answer(newer)


async def ended_while_trickling(connection: Connection, head: bytes) -> bool:
    """Sends a byte again and again, until the server ends the connection."""
    connection[1].write(head)
    ended = asyncio.create_task(end(connection))
    while not ended.done():
        connection[1].write(b"a")
        await asyncio.sleep(0.01)
    return await ended == b""


async def test_a_response_does_not_wait_until_the_last_one_is_acknowledged() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_idle_connections_are_closed_by_the_client_first() -> None:
    """Else a request may go out on a connection that the server is closing, and be lost."""
    from embferry.serve.http.backends import Backends
    from embferry.serve.http.serving import KEEP_ALIVE_SECONDS

    assert Backends.keepalive_seconds < KEEP_ALIVE_SECONDS / 2
    assert KEEP_ALIVE_SECONDS > 5, "httpx, which OpenAI's library uses, keeps idle connections for 5 s"
