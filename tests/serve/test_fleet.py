"""The router's list of workers when the bootstrap server is slow."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from embferry.serve.config import RouterSettings, Settings
from embferry.serve.errors import ServeError
from embferry.serve.router.fleet import Fleet
from tests.serve.fakes import Deployment
from tests.serve.test_clients import CHAT

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


BAD_ENTRIES: list[dict[str, Any]] = [
    {"url": "127.0.0.1:8001"},
    {"url": "ftp://127.0.0.1:8001"},
    {"url": "http://"},
    {"url": "http://[::1"},
    {"url": "http://127.0.0.1:99999"},
    {"url": "http://127.0.0.1:port"},
    {"url": "http://127.0.0.1/?query"},
    {"url": 5},
    {"role": "cook"},
    {"load": -1},
    {"id": "a b"},
]


@pytest.mark.integration
@pytest.mark.parametrize("bad", BAD_ENTRIES, ids=str)
def test_a_malformed_lease_hides_no_other_worker(
    deployment: Deployment, bad: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The list goes on changing beside the malformed entry, which is reported once."""
    with caplog.at_level(logging.WARNING, "embferry.serve.router.fleet"):
        deployment.workers = [deployment.entry("encode1", **bad), deployment.entry("language0")]
        deployment.wait(lambda: ready(deployment) == {"encode": 0, "language": 1})
        deployment.workers = [*deployment.workers, deployment.entry("encode0")]
        deployment.wait(lambda: ready(deployment) == {"encode": 1, "language": 1})
        answer = httpx.post(f"{deployment.url}/v1/chat/completions", json=CHAT, timeout=100, trust_env=False)
        assert answer.status_code == 200
    assert sum("passed over" in record.getMessage() for record in caplog.records) == 1


def ready(deployment: Deployment) -> dict[str, int]:
    return dict(httpx.get(f"{deployment.url}/ready", timeout=100, trust_env=False).json()["workers"])
