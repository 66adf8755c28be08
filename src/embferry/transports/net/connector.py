"""Whom we connect to: a connection that is being made on the loop, and what finds out that the other end is gone."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from embferry.protocol.errors import TransportError

from .loop import WRITE, Loop

_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),  # ms without an acknowledgement of sent bytes (RFC 5482)
)


def set_keepalive(sock: socket.socket) -> None:
    """Finds out within half a minute that the peer's host is gone."""
    for option in _KEEPALIVE:
        sock.setsockopt(*option)


def connecting(address: tuple[str, int]) -> socket.socket:
    """A socket that does not block, whose connection to the IP address and port has begun.

    :raises TransportError: it is refused at once.
    """
    host, port = address
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        set_keepalive(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(address)
    except BlockingIOError:
        pass
    except OSError as error:
        sock.close()
        raise TransportError(f"cannot connect to {host} port {port}: {error}") from error
    return sock


class Connector:
    """A connection to a receiver. Its socket is the caller's, who has it no longer watched when it is connected.

    :param connected: or ``failed`` is called on the loop's thread, unless the socket is closed before.
    :raises TransportError: it is refused at once.
    """

    def __init__(
        self,
        address: tuple[str, int],
        loop: Loop,
        timeout_s: float,
        connected: Callable[[], None],
        failed: Callable[[TransportError], None],
    ) -> None:
        self.sock = connecting(address)
        self.connected = False
        self._loop, self._timeout_s, self._on_connected, self._on_failed = loop, timeout_s, connected, failed

    def start(self) -> None:
        """From any thread: the caller is ready to be told."""
        self._loop.call(self._start)

    def _start(self) -> None:
        if self.sock.fileno() >= 0:
            self._loop.watch(self.sock.fileno(), WRITE, self._ready)
            self._loop.later(self._timeout_s, self._check)

    def _ready(self, _: int) -> None:
        self._loop.unwatch(self.sock.fileno())
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._on_failed(TransportError(f"cannot connect to the receiver: {os.strerror(code)}"))
            return
        self.connected = True
        self._on_connected()

    def _check(self) -> None:
        if not self.connected and self.sock.fileno() >= 0:
            self._on_failed(TransportError(f"the receiver did not answer within {self._timeout_s} s"))
