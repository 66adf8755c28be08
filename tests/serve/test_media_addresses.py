"""Which hosts and addresses may be asked for media."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.media import addresses as under_test
from embferry.serve.media.addresses import LOOKUPS, LOOKUPS_OF_CLIENT, is_public, permitted_addresses
from embferry.serve.shared_threads import acting_for
from tests.serve.blocking import DEADLINE, Blocking


@pytest.mark.parametrize(
    ("entry", "url", "allowed"),
    [
        ("example.com", "https://example.com/", True),
        ("example.com", "http://EXAMPLE.com:80/", True),
        ("Example.com", "https://example.com/", True),
        ("example.com", "https://example.com:8443/", False),
        ("example.com:8443", "https://example.com:8443/", True),
        ("example.com", "https://www.example.com/", False),
        ("*.example.com", "https://www.example.com/", True),
        ("*.example.com", "https://a.b.example.com/", True),
        ("*.example.com", "https://example.com/", False),
        ("*.example.com", "https://evilexample.com/", False),
        ("*", "https://anything.org/", True),
        ("*", "https://anything.org:22/", False),
        ("[2001:db8::1]:8080", "http://[2001:db8::1]:8080/", True),
        ("2001:db8::1", "http://[2001:db8::1]/", True),
        ("*.Bücher.example:81", "http://www.xn--bcher-kva.example:81/", True),
        ("bücher..example", "http://xn--bcher-kva.example/", False),
    ],
)
def test_an_entry_of_the_list_admits_its_hosts_only(
    monkeypatch: pytest.MonkeyPatch, entry: str, url: str, allowed: bool
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34"]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    if allowed:
        assert asyncio.run(permitted_addresses(urlsplit(url), (entry,))) == ["93.184.216.34"]
    else:
        with pytest.raises(ServeError) as caught:
            asyncio.run(permitted_addresses(urlsplit(url), (entry,)))
        assert caught.value.code == "host_not_allowed"


@pytest.mark.parametrize(
    "address", ["10.0.0.5", "192.168.1.1", "169.254.169.254", "::1", "fd00::1", "0.0.0.0", "100.64.0.1"]
)
def test_a_name_with_a_private_address_needs_to_be_listed_in_full(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34", address]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    url = urlsplit("https://inside.example.com/")
    with pytest.raises(ServeError) as caught:
        asyncio.run(permitted_addresses(url, ("*.example.com",)))
    assert caught.value.code == "host_not_allowed"
    assert address not in caught.value.detail  # clients would learn what a name means in here
    assert "inside.example.com" in caught.value.detail
    assert asyncio.run(permitted_addresses(url, ("inside.example.com",)))


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1", "127.0.0.1", "0.0.0.0", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255",
        "240.0.0.1", "::", "::1", "::127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:10.0.0.1", "64:ff9b::10.0.0.1",
        "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::", "fe80::1", "fe80::1%eth0", "fec0::1", "fd00::1", "ff02::1",
        "2001:db8::1", "2001::1", "junk", "", "2001:4860::5efe:10.0.0.1", "2001:4860::200:5efe:10.0.0.1",
        "2002:808:808::5efe:10.0.0.1", "168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::192.0.0.192",
    ],
)  # fmt: skip
def test_an_address_that_leads_inside_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::", "2001:4860::5efe:8.8.8.8"],
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


REGISTRIES = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.31.196.0/24
192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4
240.0.0.0/4 ::/128 ::1/128 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001:db8::/32 2620:4f:8000::/48 3fff::/20
5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8
"""
"""IANA's registries of special-purpose addresses, and those of multicast."""


@pytest.mark.parametrize("network", REGISTRIES.split())
def test_no_address_for_a_special_purpose_is_public(network: str) -> None:
    listed = ipaddress.ip_network(network)
    for index in (0, listed.num_addresses // 2, -1):
        assert not is_public(str(listed[index])), listed[index]


def test_the_list_does_not_depend_on_the_version_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address):
        monkeypatch.setattr(kind, "is_global", True)
    for network in REGISTRIES.split():
        assert not is_public(str(ipaddress.ip_network(network)[-1])), network


INSIDE = {
    "cloud metadata behind NAT64": "64:ff9b::a9fe:a9fe",
    "6to4 of this machine": "2002:7f00:1::",
    "an IPv4-compatible address of this machine": "::127.0.0.1",
    "an IPv4-mapped private address": "::ffff:192.168.0.1",
    "site-local": "fec0::1",
    "site-local, at its end": "feff:ffff::1",
    "multicast of IPv6": "ff0e::1",
    "multicast of IPv4": "239.255.255.250",
    "multicast in 6to4": "2002:e000:1::",
}


@pytest.mark.parametrize("entry", ["*", "*.example"])
@pytest.mark.parametrize("name", INSIDE)
def test_no_pattern_admits(monkeypatch: pytest.MonkeyPatch, name: str, entry: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return [INSIDE[name]]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    hosts = (
        ["media.example"]
        if entry != "*"
        else ["media.example", *([f"[{INSIDE[name]}]"] if ":" in INSIDE[name] else [])]
    )
    for host in hosts:
        with pytest.raises(ServeError) as caught:
            asyncio.run(permitted_addresses(urlsplit(f"http://{host}/"), (entry,)))
        assert caught.value.code == "host_not_allowed"


@pytest.mark.asyncio
@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "times out"])
async def test_slow_names_of_a_client_keep_no_other_client_waiting(
    monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """A lookup cannot be ended: it counts as its client's for as long as it takes."""
    system = socket.getaddrinfo
    slow = Blocking(lambda *_: system("127.0.0.1", 80, type=socket.SOCK_STREAM))

    def lookup(host: str, *arguments: Any, **options: Any) -> Any:
        return slow() if host.startswith("slow") else system(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)

    def ask(host: str) -> asyncio.Task[list[str]]:
        return asyncio.create_task(permitted_addresses(urlsplit(f"http://{host}/"), (host,)))

    try:
        with acting_for("slow"):
            asked = [ask(f"slow{number}") for number in range(2 * LOOKUPS)]
            while slow.calls < LOOKUPS_OF_CLIENT:
                await asyncio.sleep(0.001)
            if leaves:
                for task in asked:
                    task.cancel()
                await asyncio.wait(asked)
                asked = [ask(f"slow{number}") for number in range(LOOKUPS)]
        with acting_for("other"):
            async with asyncio.timeout(DEADLINE / 2):
                assert await ask("127.0.0.1") == ["127.0.0.1"]
        assert slow.calls == LOOKUPS_OF_CLIENT
    finally:
        slow.release.set()
    async with asyncio.timeout(DEADLINE):
        assert await asyncio.gather(*asked) == [["127.0.0.1"]] * len(asked), "the others have their turns"
