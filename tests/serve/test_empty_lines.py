"""Empty lines before a request are no request: some clients send one behind a body (RFC 9112, 2.2)."""

from __future__ import annotations

import asyncio

import h11
import pytest

from embferry.trust.chunks import BoundedChunks
from tests.serve.test_connections import Server, answer
from tests.serve.test_refused_heads import refusal

pytestmark = pytest.mark.asyncio

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"


@pytest.mark.parametrize("between", [b"\r\n", b"\n", b"\r\n\r\n\n"])
@pytest.mark.parametrize("step", [1, 2, 1000])
async def test_empty_lines_between_requests_are_passed_over(between: bytes, step: int) -> None:
    async with Server().running() as server:
        connection = await server.connect()
        sent = between + REQUEST + between + REQUEST + between
        for at in range(0, len(sent), step):
            connection[1].write(sent[at : at + step])
            await asyncio.sleep(0)
        for _ in range(2):
            assert b" 200 OK\r\n" in await answer(connection)
        connection[1].write(REQUEST)
        assert b" 200 OK\r\n" in await answer(connection)


@pytest.mark.parametrize(
    "start", [b"\r\rGET / HTTP/1.1\r\n\r\n", b"\r\n GET / HTTP/1.1\r\n\r\n", b"\rGET / HTTP/1.1\r\n\r\n"]
)
async def test_what_is_no_empty_line_is_refused(start: bytes) -> None:
    async with Server().running() as server:
        connection = await server.connect()
        connection[1].write(start)
        assert (await refusal(connection))[0] == 400


@pytest.mark.parametrize("rest", [b"", b"\r", b"\n", b"\r\n", b"\r\n\r"])
async def test_half_an_empty_line_and_an_end_are_an_end(rest: bytes) -> None:
    """A reader that is told to wait for more would wait for ever."""
    connection = BoundedChunks(h11.SERVER)
    if rest:
        connection.receive_data(rest)
    assert connection.next_event() is h11.NEED_DATA
    connection.receive_data(b"")
    try:
        assert isinstance(connection.next_event(), h11.ConnectionClosed)
    except h11.RemoteProtocolError:
        assert rest.endswith(b"\r")
