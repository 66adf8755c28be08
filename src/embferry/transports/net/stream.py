"""The socket of a connection on the loop, with TLS or without."""

from __future__ import annotations

import socket

from embferry.trust.tls import Tls

from .loop import Ready, Scope
from .tls_socket import TlsSocket

Stream = socket.socket | TlsSocket
"""The socket of a connection on the loop, encrypted or not."""


def accepted(sock: socket.socket, tls: Tls | None) -> Stream:
    """Returns the stream of a connection that this end has accepted."""
    if tls is None:
        return sock
    return TlsSocket(sock, tls.accepting(), server_side=True, allow_plain=not tls.required)


def dialled(sock: socket.socket, tls: Tls | None, host: str) -> Stream:
    """Returns the stream of a connection that this end makes.

    Args:
        sock: Connected, or connecting.
        tls: None: the connection is not encrypted.
        host: The name or address that was dialled, which the other end's certificate must have.

    Raises:
        TlsError: No certificate can have that name.
    """
    return sock if tls is None else TlsSocket(sock, tls.dialling(), server_side=False, hostname=host)


def watch(scope: Scope, stream: Stream, events: int, ready: Ready) -> None:
    """Calls ``ready(events)`` whenever ``stream`` is ready. A second call replaces events and callback."""
    if isinstance(stream, TlsSocket):
        stream.watch(scope, events, ready)
    else:
        scope.watch(stream.fileno(), events, ready)


def unwatch(scope: Scope, stream: Stream) -> None:
    """Stops watching ``stream``, which stays open."""
    if isinstance(stream, TlsSocket):
        stream.unwatch()
    scope.unwatch(stream.fileno())
