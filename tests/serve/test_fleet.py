"""The router's list of workers when the bootstrap server is slow."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.leases import Worker
from embferry.serve.config import RouterSettings, Settings
from embferry.serve.errors import ServeError
from embferry.serve.router.fleet import Fleet
from embferry.trust.digests import content_digest
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.tls import TLS_ALERT
from embferry.trust.trust import Trust
from tests.serve.fakes import Deployment
from tests.serve.test_clients import CHAT
from tests.strangers.raw_http import Change, Relay

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


@pytest.mark.asyncio
async def test_each_outage_of_the_bootstrap_server_is_logged_once_also_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = BootstrapServer(trust=NO_KEY)
    with server:
        pass  # it has a port now, at which nothing listens
    fleet = Fleet(Settings(bootstrap_url=server.url, router=RouterSettings(connect_timeout=60)))

    async def warnings_after(refreshes: int) -> int:
        for _ in range(refreshes):
            await fleet.refresh()
        return sum("the list of workers is not available" in message for message in caplog.messages)

    assert await warnings_after(3) == 1
    with server:
        assert await warnings_after(2) == 1
        assert not fleet._trouble
    assert await warnings_after(3) == 2
    await fleet.close()


@pytest.mark.asyncio
async def test_a_list_that_is_late_is_told_before_the_question_has_failed() -> None:
    """The bootstrap server does not answer, and the time for its answer is longer than a lease."""
    with BootstrapServer(trust=NO_KEY) as bootstrap:
        fleet = Fleet(Settings(bootstrap_url=bootstrap.url, router=RouterSettings(connect_timeout=60)))
        await fleet.refresh()
        assert not [why for why in fleet.missing() if "list" in why]
        fleet._source.stale_seconds = -1.0
        assert fleet.missing()[0].startswith(f"{bootstrap.url}/workers has sent no list for ")
        await fleet.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [TLS_ALERT, b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76"], ids=["alert", "hello"])
async def test_a_plain_url_of_a_server_that_speaks_tls_is_told(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    fleet = Fleet(Settings(bootstrap_url=url, router=RouterSettings(connect_timeout=60)))
    await fleet.refresh()
    assert "write https://" in fleet._trouble
    assert any("write https://" in str(vars(record)) for record in caplog.records)
    await fleet.close()
    listener.close()


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
    assert sum("left out" in record.getMessage() for record in caplog.records) == 1


def ready(deployment: Deployment) -> dict[str, int]:
    return dict(httpx.get(f"{deployment.url}/ready", timeout=100, trust_env=False).json()["workers"])


KEY = Key.new()
TRUST, STRANGER, NO_KEY = Trust(ClusterKeys(KEY)), Trust(ClusterKeys(Key.new())), Trust()
WORKER = Worker(id="enc-1", role="encode", url="http://h:1", model="shapes")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("server", "router", "trouble"),
    [
        (TRUST, TRUST, ""),
        (NO_KEY, NO_KEY, ""),
        (TRUST, STRANGER, "has another cluster key"),
        (TRUST, NO_KEY, "asks for a cluster key, and this end has none"),
        (NO_KEY, TRUST, "has no cluster key, and this end has one"),
    ],
)
async def test_the_list_of_workers_comes_from_a_server_with_the_same_key(
    server: Trust, router: Trust, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trust, "of_environment", lambda: router)
    with BootstrapServer(trust=server) as bootstrap:
        BootstrapClient(bootstrap.url, trust=server, timeout_s=60.0).register(WORKER)
        fleet = Fleet(Settings(bootstrap_url=bootstrap.url, router=RouterSettings(connect_timeout=60)))
        for _ in range(2):
            await fleet.refresh()
            assert fleet.counts()["encode"] == (0 if trouble else 1)
            assert trouble in fleet._trouble
            assert ("[wrong_key]" in fleet._trouble) is bool(trouble)
        await fleet.close()


def _with_digest(data: bytes) -> bytes:
    body = data.partition(b"\r\n\r\n")[2]
    return re.sub(rb"sha-256=:[^:]*:", content_digest(body).encode(), data)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("change", "trouble"),
    [
        (lambda data: data.replace(b"http://h:1", b"http://e:1"), "Content-Digest"),
        (lambda data: _with_digest(data.replace(b"http://h:1", b"http://e:1")), "has no proof"),
        (
            lambda data: b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"workers":[]}',
            "has no proof",
        ),
    ],
)
async def test_a_list_that_a_stranger_has_changed_is_not_used(
    change: Change, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trust, "of_environment", lambda: TRUST)
    with BootstrapServer(trust=TRUST) as bootstrap, Relay((bootstrap.host, bootstrap.port)) as relay:
        BootstrapClient(bootstrap.url, trust=TRUST, timeout_s=60.0).register(WORKER)
        settings = Settings(bootstrap_url=f"http://127.0.0.1:{relay.port}", router=RouterSettings(connect_timeout=60))
        fleet = Fleet(settings)
        await fleet.refresh()
        relay.on_answer = change
        await fleet.refresh()
        assert trouble in fleet._trouble
        assert [worker.url for worker in await fleet.candidates("encode")] == ["http://h:1"]
        await fleet.close()


@pytest.mark.asyncio
async def test_the_order_in_which_workers_are_asked() -> None:
    with BootstrapServer(trust=NO_KEY) as bootstrap:
        for name in "abc":
            worker = Worker(id=name, role="encode", url=f"http://{name}:1", endpoint="", load="abc".index(name))
            BootstrapClient(bootstrap.url, trust=NO_KEY, timeout_s=60.0).register(worker)
        fleet = Fleet(Settings(bootstrap_url=bootstrap.url))
        await fleet.refresh()

        async def order(**more: Any) -> str:
            return "".join(worker.id for worker in await fleet.candidates("encode", **more))

        assert await order() == "abc"
        assert await order(holder="c") == "cab"
        assert await order(holder="c", prefer="b") == "bca"
        assert await order(holder="c", avoid={"c"}) == "ab"
        (worker,) = (one for one in await fleet.candidates("encode") if one.id == "c")
        fleet.suspect(worker)  # it may stand still: another encode is cheaper than the wait for it
        assert await order(holder="c") == "abc"
        assert await order(prefer="c") == "cab"
        await fleet.close()
