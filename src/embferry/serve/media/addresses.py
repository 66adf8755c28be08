"""Which hosts and addresses media may be fetched from.

The guard against requests to addresses that only this machine can reach: a host must be on the list of allowed hosts,
and unless the list names it in full, all of its addresses must be public.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator
from functools import partial
from urllib.parse import SplitResult

import idna

from embferry.serve.errors import ServeError
from embferry.serve.shared_threads import SharedThreads

log = logging.getLogger(__name__)

DEFAULT_PORTS = {"http": 80, "https": 443}
LOOKUPS, LOOKUPS_OF_CLIENT = 32, 4
"""Names that are looked up at the same time, for all clients and for one; further ones wait. A lookup cannot be ended,
and the system may take long for it: it counts as its client's until then, also when ``media.fetch_timeout`` is over."""

_THREADS = SharedThreads(LOOKUPS, "media-name", most=LOOKUPS_OF_CLIENT)
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_WITH_IPV4 = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")))
"""Networks whose last 32 bits are an IPv4 address: compatible, mapped, translated, NAT64."""
_INTERNET = ipaddress.IPv6Network("2000::/3")
"""The addresses of IPv6 that are given to hosts of the internet."""
_SPECIAL = tuple(map(ipaddress.ip_network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
    "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20",
    "168.63.129.16/32",
)))  # fmt: skip
"""Networks for special purposes: of IPv4, and those of IPv6 inside of ``2000::/3``.

Those of IANA's two registries (RFC 6890, as of 2025), and Azure's host for its own machines, whose address is an
ordinary one. Oracle's and other clouds' hosts are in the registries' networks. Python's ``is_global`` knows fewer, and
its versions differ.
"""
_ISATAP = (0x00005EFE, 0x02005EFE)
"""The third quarter of an IPv6 address whose last quarter is the IPv4 address to send it to (RFC 5214, 6.1)."""


async def permitted_addresses(url: SplitResult, allowed: tuple[str, ...]) -> list[str]:
    """Returns the IP addresses to connect to for ``url``, in the order in which to try them; each of them is permitted.

    The name is resolved once, so the checked addresses are the ones used.

    The host of ``url`` is in ASCII. A host that the list names in full may have any address, because the operator has
    listed it. A host that matches only a pattern (``*``, ``*.domain``) must have public addresses only.

    Raises:
        ServeError: host_not_allowed; fetch_failed if the name has no address.
    """
    default_port = DEFAULT_PORTS[url.scheme]
    host, port = (url.hostname or "").rstrip("."), url.port or default_port
    names = [name for name, entry_port in map(_name_and_port, allowed) if port == (entry_port or default_port)]
    by_name = host in names
    if not by_name and not any(name == "*" or (name[:2] == "*." and host.endswith(name[1:])) for name in names):
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        why = f"files may not be fetched from {name}; the operator can allow it with media.allowed_hosts"
        raise ServeError("host_not_allowed", why)
    addresses = await _resolve(host, port)
    if not by_name and (private := [address for address in addresses if not is_public(address)]):
        log.debug("%s has the address %s, which is not public", host, private[0])  # not for clients to know
        why = f"{host} has an address that is not public; the operator can allow the host by its full name"
        raise ServeError("host_not_allowed", f"{why} in media.allowed_hosts")
    return addresses


def ascii_host(host: str) -> str:
    """Returns a host name as DNS and certificates have it (IDNA 2008, with the mapping of UTS 46), in small letters.

    Names that IDNA 2003 alone has, such as those of symbols, are taken too, as in browsers.

    Raises:
        ValueError: the name cannot be written so.
    """
    if host.isascii():
        return host.lower()
    try:
        return idna.encode(host, uts46=True).decode("ascii")
    except idna.IDNAError:
        return host.encode("idna").decode("ascii").lower()


def is_public(address: str) -> bool:
    """Returns whether an IP address, and every IPv4 address that it stands for, is one of the public internet."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with a zone: fe80::1%eth0
        return False
    return all(map(_is_public, (found, *_embedded(found))))


def _is_public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.sixtofour is not None or any(address in network for network in _WITH_IPV4):
            return True  # the IPv4 address decides: Python's versions differ on these
        if address not in _INTERNET:
            return False
    return address.is_global and not any(address in network for network in _SPECIAL)


def _embedded(address: _Address) -> Iterator[_Address]:
    """Yields the IPv4 addresses that a packet to an IPv6 address may be sent on to."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    is_isatap = int(address) >> 32 & 0xFFFFFFFF in _ISATAP
    if is_isatap or any(address in network for network in _WITH_IPV4):
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        yield address.sixtofour


def _name_and_port(entry: str) -> tuple[str, int | None]:
    """Splits an entry of the list. Without a port, the entry means the scheme's default port."""
    with contextlib.suppress(ValueError):  # a wrong name matches nothing
        wild, _, host = entry.strip().rpartition("*.")
        entry = f"{wild}*.{ascii_host(host)}" if "*." in entry else ascii_host(host)
    if entry.startswith("["):  # [2001:db8::1]:8080
        name, _, rest = entry[1:].partition("]")
        return name, int(rest[1:]) if rest[1:].isdigit() else None
    name, colon, port = entry.rpartition(":")
    if colon and ":" not in name and port.isdigit():
        return name, int(port)
    return entry, None


async def _resolve(host: str, port: int) -> list[str]:
    try:
        found = await _THREADS.run(partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise ServeError("fetch_failed", f"{host} has no address: {error}") from error
    addresses = [str(entry[4][0]) for entry in found]
    return sorted(dict.fromkeys(addresses), key=lambda a: ":" in a)  # IPv4 first: it works in more places
