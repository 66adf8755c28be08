"""Addresses and URLs of a process. Imports nothing heavy: processes without a model use it too."""

from __future__ import annotations

import http.client
import socket
from urllib.parse import urlsplit


def address_of(host: str) -> str:
    """Resolves a host to an IP address, IPv4 if it has one: transports take no host names.

    Raises:
        OSError: the host has no address.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def bracketed(host: str) -> str:
    """Returns a host as it is written in a URL (RFC 3986, 3.2.2)."""
    return f"[{host}]" if ":" in host else host


def url_of(host: str, listener: socket.socket) -> str:
    """Returns the URL of a listening socket under the name ``host``."""
    return f"http://{bracketed(host)}:{listener.getsockname()[1]}"


def get(url: str, path: str, seconds: float) -> tuple[int, bytes]:
    """Returns status and body of a GET request; status 0 if there is no response within ``seconds``."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
