"""Bodies in tiny chunks cost the event loop much for each byte: they are refused, and the rest is not parsed."""

from __future__ import annotations

import json

import h11
import pytest

from embferry.trust.chunks import FREE_CHUNKS, LEAST_AVERAGE
from tests.serve.test_connections import Connection, Server, answer, ask
from tests.serve.test_refused_heads import refusal

pytestmark = pytest.mark.asyncio

MANY = 50 * FREE_CHUNKS
HEAD = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunks(size: int, count: int) -> bytes:
    return b"%x\r\n%b\r\n" % (size, b"a" * size) * count


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the chunks that h11 has parsed."""
    sizes: list[int] = []
    original = h11.Connection.next_event

    def next_event(connection: h11.Connection) -> object:
        event = original(connection)
        if isinstance(event, h11.Data):
            sizes.append(len(event.data))
        return event

    monkeypatch.setattr(h11.Connection, "next_event", next_event)
    return sizes


async def test_a_body_in_tiny_chunks_is_refused(parsed: list[int]) -> None:
    async with Server().running() as server:
        connection = await server.connect()
        connection[1].write(HEAD % b"/slow" + chunks(1, MANY))
        status, _, body = await refusal(connection)
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_request")
        assert b"send fewer and larger ones" in body
        await sent_whole(connection)
    assert len(parsed) < 2 * FREE_CHUNKS


async def test_so_is_the_rest_of_a_body_whose_request_has_its_answer(parsed: list[int]) -> None:
    async with Server().running() as server:
        connection = await server.connect()
        connection[1].write(HEAD % b"/")
        await answer(connection)
        connection[1].write(chunks(1, MANY))
        await sent_whole(connection)
        assert await connection[0].read() == b""
    assert len(parsed) < 2 * FREE_CHUNKS


async def sent_whole(connection: Connection) -> None:
    """Waits until the server has taken everything: it drops what it does not parse."""
    connection[1].transport.set_write_buffer_limits(0)
    await connection[1].drain()


@pytest.mark.parametrize(("size", "count"), [(1, FREE_CHUNKS), (LEAST_AVERAGE, 5 * FREE_CHUNKS)])
async def test_a_few_tiny_chunks_and_many_larger_ones_are_taken(parsed: list[int], size: int, count: int) -> None:
    async with Server().running() as server:
        connection = await server.connect()
        for _ in range(2):  # each body on a connection has its own count
            connection[1].write(HEAD % b"/" + chunks(size, count) + b"0\r\n\r\n")
            await answer(connection)
        ask(connection)
        await answer(connection)
    assert sum(parsed) == 2 * size * count
