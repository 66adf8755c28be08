"""The router's list of workers when the bootstrap server is slow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from embferry.serve.config import RouterSettings, Settings
from embferry.serve.errors import ServeError
from embferry.serve.router.fleet import Fleet

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
REQUESTS = 20


class SlowBootstrap:
    """A bootstrap server that accepts requests and sends nothing, or a byte now and then.

    Attributes:
        requests: Connections so far.
    """

    def __init__(self, data: bytes) -> None:
        self.requests = 0
        self._data = data
        self._over = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            self._over.set()
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests += 1
        with contextlib.suppress(ConnectionError):
            for byte in self._data:
                writer.write(bytes([byte]))
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), 0.01)
                if self._over.is_set():
                    break
            await self._over.wait()
        writer.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("data", [b"", HEAD + b" " * 1000], ids=["hangs", "drips"])
async def test_requests_without_a_worker_wait_for_a_slow_bootstrap_server_together(data: bytes) -> None:
    bootstrap = SlowBootstrap(data)
    async with bootstrap.running() as url:
        fleet = Fleet(Settings(bootstrap_url=url, router=RouterSettings(connect_timeout=0.3)))
        found = await asyncio.gather(*(fleet.candidates("encode") for _ in range(REQUESTS)), return_exceptions=True)
        assert [getattr(error, "code", error) for error in found] == ["no_worker"] * REQUESTS
        assert bootstrap.requests == 1
        with pytest.raises(ServeError):
            await fleet.candidates("encode")  # a later request asks again
        assert bootstrap.requests == 2
        await fleet.close()
