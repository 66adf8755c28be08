"""The list of allowed hosts: a guard against requests to addresses that only this machine can reach."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import SplitResult

from embferry.serve.errors import ServeError

_DEFAULT_PORTS = {"http": 80, "https": 443}


async def permitted_address(url: SplitResult, allowed: tuple[str, ...]) -> str:
    """Returns the IP address to connect to for ``url``. It is resolved once, so the checked address is the one used.

    A host that the list names in full may have any address, because the operator has listed it. A host that matches
    only a pattern (``*``, ``*.domain``) must have public addresses only.

    Raises:
        ServeError: host_not_allowed; fetch_failed if the name has no address.
    """
    host, port = (url.hostname or "").rstrip("."), url.port or _DEFAULT_PORTS[url.scheme]
    by_name = any(_names(entry, host, port, url.scheme) for entry in allowed)
    if not by_name and not any(_matches(entry, host, port, url.scheme) for entry in allowed):
        raise ServeError(
            "host_not_allowed",
            f"files may not be fetched from {host}:{port}; the operator can allow it with media.allowed_hosts",
        )
    addresses = await _resolve(host, port)
    if not by_name and (private := [a for a in addresses if not ipaddress.ip_address(a).is_global]):
        raise ServeError("host_not_allowed", f"{host} resolves to {private[0]}, which is not a public address")
    return addresses[0]


def _names(entry: str, host: str, port: int, scheme: str) -> bool:
    """Returns whether ``entry`` is the host itself. An entry without a port means the scheme's default port."""
    name, entry_port = _parts(entry)
    return name == host and port == (entry_port or _DEFAULT_PORTS[scheme])


def _matches(entry: str, host: str, port: int, scheme: str) -> bool:
    """Returns whether ``entry`` is a pattern that the host matches."""
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
