"""Which hosts may be asked for a file, and at which address: the guard against requests to places only we can reach."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import SplitResult

from embferry.serve.errors import ServeError

_DEFAULT_PORTS = {"http": 80, "https": 443}


async def permitted_address(url: SplitResult, allowed: tuple[str, ...]) -> str:
    """The IP address to connect to for ``url``: resolved once, so that what was checked is what is used.

    A host in the list by its full name may have any address: whoever runs the router has said so. One that only a
    pattern (``*``, ``*.domain``) admits must have none but public addresses.

    Raises:
        ServeError: host_not_allowed, fetch_failed when the name has no address.
    """
    host, port = (url.hostname or "").rstrip("."), url.port or _DEFAULT_PORTS[url.scheme]
    by_name = any(_names(entry, host, port, url.scheme) for entry in allowed)
    if not by_name and not any(_admits(entry, host, port, url.scheme) for entry in allowed):
        raise ServeError(
            "host_not_allowed",
            f"files may not be fetched from {host}:{port}; whoever runs the router can list it (media.allowed_hosts)",
        )
    addresses = await _resolve(host, port)
    if not by_name and (private := [a for a in addresses if not ipaddress.ip_address(a).is_global]):
        raise ServeError("host_not_allowed", f"{host} leads to {private[0]}, which is not a public address")
    return addresses[0]


def _names(entry: str, host: str, port: int, scheme: str) -> bool:
    """Whether ``entry`` is the host itself; without a port it stands for the scheme's usual one."""
    name, entry_port = _parts(entry)
    return name == host and port == (entry_port or _DEFAULT_PORTS[scheme])


def _admits(entry: str, host: str, port: int, scheme: str) -> bool:
    name, entry_port = _parts(entry)
    matches = name == "*" or (name.startswith("*.") and host.endswith(name[1:]))
    return matches and port == (entry_port or _DEFAULT_PORTS[scheme])


def _parts(entry: str) -> tuple[str, int | None]:
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
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServeError("fetch_failed", f"{host} has no address: {error}") from error
    addresses = [str(entry[4][0]) for entry in found]
    return sorted(addresses, key=lambda a: ":" in a)  # IPv4 first: it works in more places
