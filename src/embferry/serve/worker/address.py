"""Where a process listens, and what it tells others of it. Light: processes without a model use it too."""

from __future__ import annotations

import socket


def address_of(host: str) -> str:
    """The IP address of a host: the data connections take no names. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def bracketed(host: str) -> str:
    """A host as it is written in a URL (RFC 3986, 3.2.2)."""
    return f"[{host}]" if ":" in host else host


def url_of(host: str, listener: socket.socket) -> str:
    return f"http://{bracketed(host)}:{listener.getsockname()[1]}"
