"""Addresses and URLs of a process. Imports nothing heavy: processes without a model use it too."""

from __future__ import annotations

import contextlib
import http.client
import socket
from urllib.parse import urlsplit

from embferry.trust.trust import Trust

MAX_BODY_BYTES = 1 << 20
"""Longest body that :func:`get` reads."""


def address_of(host: str) -> str:
    """Resolves a host to an IP address: transports take no host names.

    Of several, it is one that this machine has, where it has one; of those, IPv4 before IPv6. So a name whose IPv4
    address this machine lacks stands for its IPv6 address.

    Raises:
        OSError: the host has no address.
    """
    found = addresses_of(host)
    return next((address for family, address in found if _is_here(family, address)), found[0][1])


def addresses_of(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Returns the IP addresses of a host, IPv4 first, with their families.

    Raises:
        OSError: the host has none.
    """
    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    addresses = [(family, str(address[0])) for family, _, _, _, address in found]
    return sorted(dict.fromkeys(addresses), key=lambda entry: entry[0] != socket.AF_INET)


def _is_here(family: socket.AddressFamily, address: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 0))
        return True
    return False


def bracketed(host: str) -> str:
    """Returns a host as it is written in a URL (RFC 3986, 3.2.2)."""
    return f"[{host}]" if ":" in host else host


def url_of(host: str, listener: socket.socket, scheme: str = "http") -> str:
    """Returns the URL of a listening socket under the name ``host``."""
    return f"{scheme}://{bracketed(host)}:{listener.getsockname()[1]}"


def get(url: str, path: str, seconds: float) -> tuple[int, bytes]:
    """Returns status and body of a GET request; status 0 if there is none within ``seconds``, or a longer body.

    Servers at ``https`` are those of the cluster.
    """
    parts = urlsplit(url)
    host, tls = parts.hostname or "", Trust.of_environment().tls
    connection = http.client.HTTPConnection(host, parts.port, timeout=seconds)
    if parts.scheme == "https" and tls is not None:
        connection = http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=tls.dialling())
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read(MAX_BODY_BYTES + 1)
        return (response.status, body) if len(body) <= MAX_BODY_BYTES else (0, b"")
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
