"""Requests that are not HTTP/1.1 get an error as any other, and cannot fill the log."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from embferry.serve.http import connections
from tests.serve.test_connections import Connection, Server, answer, ask

pytestmark = pytest.mark.asyncio

MALFORMED = {
    "no HTTP": b"\x16\x03\x01 hello\r\n\r\n",
    "a word": b"quit\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a length that is no number": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "a chunk without a length": b"POST /slow HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "to HEAD": b"HEAD /slow HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


async def refusal(connection: Connection) -> tuple[int, dict[bytes, bytes], bytes]:
    """Returns status, headers and body of an answer after which the server closes."""
    head, _, body = (await connection[0].read()).partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
    return int(first.split()[1]), headers, body


@pytest.mark.parametrize("how", MALFORMED)
async def test_a_malformed_request_gets_an_error_with_code_and_id(how: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Server(connections=20, per_address=20).running() as server:
        for _ in range(3):
            connection = await server.connect()
            connection[1].write(MALFORMED[how])
            status, headers, body = await refusal(connection)
            assert status == 400
            assert headers[b"content-type"] == b"application/json"
            assert headers[b"connection"] == b"close"
            assert len(headers[b"x-request-id"]) == 32
            if how == "to HEAD":
                assert body == b""
            else:
                assert json.loads(body)["error"]["code"] == "invalid_request"
        last = await server.connect()
        ask(last)
        await answer(last)
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]  # of three
    assert "refused a request of 127.0.0.1: " in line.getMessage()
    assert line.__dict__["request_id"]


@pytest.mark.parametrize("size", [connections.MAX_HEAD_BYTES + 1000, 8 << 20])
async def test_a_head_that_is_too_large_gets_431_also_while_it_is_being_sent(size: int) -> None:
    async with Server().running() as server:
        connection = await server.connect()
        connection[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        await connection[1].drain()
        reading = asyncio.create_task(refusal(connection))
        for _ in range(size // 1000):
            connection[1].write(b"x-filler: " + b"x" * 988 + b"\r\n")
            await connection[1].drain()
        status, headers, body = await reading
        assert (status, json.loads(body)["error"]["code"]) == (431, "head_too_large")
        assert b"x-request-id" in headers


async def test_a_refused_client_that_does_not_leave_makes_room() -> None:
    async with Server().running() as server:
        for _ in range(10):
            (await server.connect())[1].write(b"quit\r\n\r\n")
        asking = await server.connect()
        ask(asking)
        await answer(asking)


async def test_a_refused_client_that_does_not_leave_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REST_SECONDS", 0.01)
    async with Server().running() as server:
        connection = await server.connect()
        connection[1].write(b"quit\r\n\r\n")
        await refusal(connection)
        while server.open:
            await asyncio.sleep(0.001)
