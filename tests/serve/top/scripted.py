"""A router that tells what a test says, in the event loop of the test."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.cli.messages import message
from tests.ports import free_port


class Scripted:
    """A router.

    Attributes:
        message: the first message of every stream.
        refusal: the status and JSON with which streams are refused; None: they are not.
        asked: the heads of the requests.
    """

    def __init__(self, **changes: Any) -> None:
        self.message = message(**changes)
        self.refusal: tuple[int, Any] | None = None
        self.asked: list[bytes] = []
        self._port = free_port()  # which nothing else gets while it is gone
        self._streams: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Scripted:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Its URL, also while it is gone."""
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Begins to answer, on the port that it had before."""
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", self._port)

    async def stop(self) -> None:
        """Goes away, and cuts off all streams."""
        self._server.close()
        for writer in self._streams:
            writer.transport.abort()
        self._streams.clear()
        await self._server.wait_closed()

    async def tell(self, **changes: Any) -> None:
        """Sends a message to every stream."""
        await self.send(json.dumps(message(**{"first": False, **changes})).encode())

    async def send(self, data: bytes) -> None:
        """Sends an event to every stream."""
        for writer in list(self._streams):
            writer.write(b"data: " + data + b"\n\n")
            await writer.drain()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        if self.refusal is not None:
            status, body = self.refusal
            data = json.dumps(body).encode()
            writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n")
        writer.write(b"data: " + json.dumps(self.message).encode() + b"\n\n")
        self._streams.add(writer)
        await writer.drain()
