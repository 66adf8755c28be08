"""Requests that have not ended when a server ends: their clients are told, and the log has one line."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from embferry.serve.http.disconnect import wait_for_disconnect
from embferry.serve.http.serving import listen, serve_app
from embferry.trust.digests import MESSAGE_DIGEST

pytestmark = [pytest.mark.asyncio, pytest.mark.integration]

BODIES = 20
DEADLINE = 60.0


class Reading:
    """Reads bodies to their end; ``/stream`` answers for as long as its client is there."""

    def __init__(self) -> None:
        self.begun = self.left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.begun += 1
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"word", "more_body": True})
        await wait_for_disconnect(receive)
        self.left += 1


async def ended(requests: list[bytes]) -> tuple[list[bytes], Reading]:
    """Returns what each of the requests is answered by a server that ends meanwhile."""
    app, is_over, started = Reading(), False, asyncio.Event()
    with listen("127.0.0.1", 0) as listener:
        serving = asyncio.create_task(serve_app(app, listener, started.set, is_broken=lambda: is_over, close_seconds=0))
        async with asyncio.timeout(DEADLINE):
            await started.wait()
            made = [await asyncio.open_connection(*listener.getsockname()[:2]) for _ in requests]
            for request, (_, writer) in zip(requests, made, strict=True):
                writer.write(request)
            while app.begun < len(requests):
                await asyncio.sleep(0.001)
            is_over = True
            answers = [await read(reader) for reader, _ in made]
            await serving
            for _, writer in made:
                writer.close()
    return answers, app


async def read(reader: asyncio.StreamReader) -> bytes:
    got = b""
    try:
        while data := await reader.read(65536):
            got += data
    except ConnectionResetError:
        pass
    return got


async def test_open_bodies_are_told_to_ask_again_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    answers, app = await ended([head] * BODIES)
    assert app.left == BODIES
    for answer in answers:
        status, _, body = answer.partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 503 ")
        assert b"x-request-id" in status
        assert b"retry-after: 1" in status
        assert json.loads(body)["error"]["code"] == "capacity_exhausted"
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert lines == [f"{BODIES} requests have not ended in 0 s and are cut off"]


async def test_a_stream_does_not_look_complete() -> None:
    (answer,), app = await ended([b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n"])
    assert app.left == 1
    assert b"word" in answer
    assert not answer.endswith(b"0\r\n\r\n")


async def test_a_part_of_the_fleet_gets_no_answer_without_a_digest() -> None:
    request = f"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n{MESSAGE_DIGEST}: x\r\n\r\n".encode()
    (answer,), app = await ended([request])
    assert (answer, app.left) == (b"", 1)
