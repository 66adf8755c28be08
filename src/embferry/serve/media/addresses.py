"""Which hosts and addresses media may be fetched from.

The guard against requests to addresses that only this machine can reach: a host must be on the list of allowed hosts,
and unless the list names it in full, all of its addresses must be public.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from functools import partial
from urllib.parse import SplitResult

from embferry.serve.errors import ServeError
from embferry.serve.shared_threads import SharedThreads

DEFAULT_PORTS = {"http": 80, "https": 443}
LOOKUPS, LOOKUPS_OF_CLIENT = 32, 4
"""Names that are looked up at the same time, for all clients and for one; further ones wait. A lookup cannot be ended,
and the system may take long for it: it counts as its client's until then, also when ``media.fetch_timeout`` is over."""

_THREADS = SharedThreads(LOOKUPS, "media-name", most=LOOKUPS_OF_CLIENT)
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_WITH_IPV4 = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")))
"""Networks whose last 32 bits are an IPv4 address: compatible, mapped, translated, NAT64."""
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")


async def permitted_addresses(url: SplitResult, allowed: tuple[str, ...]) -> list[str]:
    """Returns the IP addresses to connect to for ``url``, in the order in which to try them; each of them is permitted.

    The name is resolved once, so the checked addresses are the ones used.

    A host that the list names in full may have any address, because the operator has listed it. A host that matches
    only a pattern (``*``, ``*.domain``) must have public addresses only.

    Raises:
        ServeError: host_not_allowed; fetch_failed if the name has no address.
    """
    default_port = DEFAULT_PORTS[url.scheme]
    host, port = (url.hostname or "").rstrip("."), url.port or default_port
    names = [name for name, entry_port in map(_name_and_port, allowed) if port == (entry_port or default_port)]
    by_name = host in names
    if not by_name and not any(name == "*" or (name[:2] == "*." and host.endswith(name[1:])) for name in names):
        why = f"files may not be fetched from {host}:{port}; the operator can allow it with media.allowed_hosts"
        raise ServeError("host_not_allowed", why)
    addresses = await _resolve(host, port)
    if not by_name and (private := [address for address in addresses if not is_public(address)]):
        raise ServeError("host_not_allowed", f"{host} resolves to {private[0]}, which is not a public address")
    return addresses


def is_public(address: str) -> bool:
    """Returns whether an IP address, and every IPv4 address that it stands for, is one of the public internet."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with a zone: fe80::1%eth0
        return False
    return all(map(_is_public, (found, *_embedded(found))))


def _is_public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if next(_embedded(address), None) is not None:
            return True  # the IPv4 address decides: Python's versions differ on these
        if address.is_site_local or address in _LOCAL_NAT64:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _embedded(address: _Address) -> Iterator[_Address]:
    """Yields the IPv4 addresses that a packet to an IPv6 address may be sent on to."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    if any(address in network for network in _WITH_IPV4):
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        yield address.sixtofour


def _name_and_port(entry: str) -> tuple[str, int | None]:
    """Splits an entry of the list. Without a port, the entry means the scheme's default port."""
    entry = entry.strip().lower()
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
