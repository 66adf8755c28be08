"""Hosts that media are fetched from: their names and addresses, what they send, how clients share fetches."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.media import addresses as under_test
from embferry.serve.media.fetch import Fetcher
from embferry.serve.shared_threads import acting_for
from tests.serve.web_site import PNG, Site, fetch, refusal


@pytest.mark.parametrize(
    "host", ["a\0.h", "a b.h", "a%00b.h", "a\\\\.h", ".h", "a..h", "\ud800.h", "a\x7f.h", "a'.h", "h:", "é:8x"]
)
def test_a_host_that_two_programs_read_differently_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """The system's lookup reads no further than to a zero byte."""

    async def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("it was looked up")

    monkeypatch.setattr(under_test, "_resolve", resolve)
    assert refusal(f"http://{host}/", allowed_hosts=("*.h",)) in ("invalid_url", "host_not_allowed")


@pytest.mark.parametrize("name", ["bücher.example", "BÜCHER.example.", "xn--bcher-kva.example"])
@pytest.mark.parametrize("listed", ["bücher.example", "xn--bcher-kva.example"])
def test_an_international_name_is_asked_in_the_letters_of_dns(
    site: str, monkeypatch: pytest.MonkeyPatch, name: str, listed: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1" if host == "xn--bcher-kva.example" else "192.0.2.1"]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    port = site.partition(":")[2]
    assert fetch(f"http://u:é@{name}:{port}/picture", allowed_hosts=(f"{listed}:{port}",)) == PNG
    assert Site.seen[0][1].removesuffix(f":{port}").rstrip(".").lower() == "xn--bcher-kva.example"  # type: ignore[union-attr]


def test_a_site_gets_no_cookie_back_and_fills_no_memory_with_them(site: str) -> None:
    """The addresses of sites are their domains here, so a site would get those of others at the same address."""

    async def run() -> None:
        fetcher = Fetcher(MediaSettings(allowed_hosts=(site,)))
        for _ in range(2):
            assert await fetcher.fetch(f"http://{site}/cookie") == PNG
        assert len(fetcher._client.cookies.jar) == 0
        await fetcher.close()

    asyncio.run(run())
    assert Site.cookies == [None, None]


def test_a_client_whose_hosts_are_slow_leaves_slots_to_others(site: str) -> None:
    async def run() -> None:
        fetcher = Fetcher(MediaSettings(allowed_hosts=(site,), fetch_timeout=100), max_connections=4)
        with acting_for("first"):
            slow = [asyncio.create_task(fetcher.fetch(f"http://{site}/silent")) for _ in range(20)]
        while len(Site.seen) < 2:
            await asyncio.sleep(0.001)
        for other in ("second", "third"):
            with acting_for(other):
                assert await fetcher.fetch(f"http://{site}/picture") == PNG
        assert [path for path, _ in Site.seen] == ["/silent", "/silent", "/picture", "/picture"]
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)
        await fetcher.close()

    asyncio.run(run())


def test_the_wait_for_a_slot_is_no_part_of_a_fetch(site: str) -> None:
    async def run() -> None:
        fetcher = Fetcher(MediaSettings(allowed_hosts=(site,), fetch_timeout=0.2), max_connections=1)
        fetches = [fetcher.fetch(f"http://{site}/{path}") for path in ("silent", "silent", "picture")]
        first, second, last = await asyncio.gather(*fetches, return_exceptions=True)
        assert [first.code, second.code] == ["fetch_timeout"] * 2  # type: ignore[union-attr]
        assert last == PNG
        await fetcher.close()

    asyncio.run(run())


def test_a_site_that_sends_a_picture_in_tiny_chunks_is_refused(site: str) -> None:
    """Each chunk costs the event loop as much as hundreds of bytes."""
    seen: list[int] = []
    assert refusal(f"http://{site}/chunks", seen, allowed_hosts=(site,)) == "fetch_failed"
    assert sum(seen) < 10_000


def test_the_address_that_was_checked_is_the_one_that_is_asked(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that has another address at each lookup gains nothing: it is looked up once."""
    lookups = []

    async def rebinding(host: str, port: int) -> list[str]:
        lookups.append(host)
        return ["127.0.0.1" if len(lookups) == 1 else "192.0.2.1"]

    monkeypatch.setattr(under_test, "_resolve", rebinding)
    port = site.partition(":")[2]
    assert fetch(f"http://media.example:{port}/picture", allowed_hosts=(f"media.example:{port}",)) == PNG
    assert lookups == ["media.example"]


def test_the_next_address_of_a_name_is_tried_if_one_cannot_be_reached(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a host with an IPv6 address behind a network without IPv6: refused at once, or silent for its share."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "192.0.2.1", "127.0.0.1"]  # the site listens at the last one only

    shares: dict[str, float] = {}
    send = httpx.AsyncClient.send

    async def silent(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        shares[request.url.host] = request.extensions["timeout"]["connect"]
        if request.url.host == "192.0.2.1":
            raise httpx.ConnectTimeout("the share of this address is over", request=request)
        return await send(self, request, **options)

    monkeypatch.setattr(under_test, "_resolve", resolve)
    monkeypatch.setattr(httpx.AsyncClient, "send", silent)
    port = site.partition(":")[2]
    limits = {"allowed_hosts": (f"media.example:{port}",), "fetch_timeout": 60}
    assert fetch(f"http://media.example:{port}/picture", **limits) == PNG
    assert list(shares) == ["127.0.0.2", "192.0.2.1", "127.0.0.1"]
    assert shares["127.0.0.2"] <= 20
    assert shares["192.0.2.1"] <= 30
    assert [host for path, host in Site.seen if path == "/picture"][-1] == f"media.example:{port}"


@pytest.mark.parametrize(
    "url", ["http://h:80\\@127.0.0.1/", "http://h\t@127.0.0.1/", "http://127.0.0.1\\.h/", "http://h#@127.0.0.1/"]
)
def test_a_url_that_two_parsers_read_differently_reaches_the_checked_host(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["0.0.0.0" if "127" in host else "192.0.2.1"]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    asked: list[httpx.URL] = []

    async def send(self: httpx.AsyncClient, request: httpx.Request, **options: object) -> httpx.Response:
        asked.append(request.url)
        raise httpx.ConnectError("no network in tests")

    monkeypatch.setattr(httpx.AsyncClient, "send", send)
    assert refusal(url, allowed_hosts=("h",)) in ("host_not_allowed", "fetch_failed", "invalid_url")
    assert {(target.host, target.port) for target in asked} <= {("192.0.2.1", None), ("192.0.2.1", 80)}
