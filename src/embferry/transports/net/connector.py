"""Non-blocking outgoing connections, and the keep-alive that detects a dead peer."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from embferry.protocol.errors import TransportError, TransportStalled
from embferry.trust.greeting import Greeting
from embferry.trust.tls import Tls

from .greeter import Greeter
from .loop import WRITE, Scope
from .stream import Stream, dialled
from .tls_socket import TlsError

_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),  # ms without an acknowledgement of sent bytes (RFC 5482)
)


def set_keepalive(sock: socket.socket) -> None:
    """Makes the kernel detect within half a minute that the peer's host is gone."""
    for option in _KEEPALIVE:
        sock.setsockopt(*option)


def connecting(address: tuple[str, int]) -> socket.socket:
    """Returns a non-blocking socket that is connecting to an IP address and port.

    Raises:
        TransportError: The connection was refused at once, or no descriptor is left for it.
    """
    host, port = address
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise TransportError(f"cannot connect to {host} port {port}: {error}") from error
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
    except BaseException:
        sock.close()
        raise
    return sock


class Connector:
    """An outgoing connection that is being made. Once connected, the caller owns the socket, unwatched.

    Args:
        address: IP address and port.
        loop: Watches the socket.
        timeout_s: Seconds until ``failed`` is called.
        connected: Called on the loop's thread, without locks, once connected. Must not block.
        failed: Called likewise if the connection fails. Neither is called if the socket is closed before.
        greet: Makes the greeting, which is a part of connecting; None: the peer does not greet.
        tls: The certificate of this end, whose handshake is a part of connecting; None: no encryption.
        host: The name or address that the peer's certificate must have; None: that of ``address``.

    Raises:
        TransportError: The connection was refused at once, or no certificate can have that name.
    """

    def __init__(
        self,
        address: tuple[str, int],
        loop: Scope,
        timeout_s: float,
        connected: Callable[[], None],
        failed: Callable[[TransportError], None],
        greet: Callable[[], Greeting] | None = None,
        tls: Tls | None = None,
        host: str | None = None,
    ) -> None:
        self.sock = _stream(connecting(address), tls, host or address[0])
        self.connected = False
        self._loop, self._timeout_s, self._greet = loop, timeout_s, greet
        self._on_connected, self._on_failed = connected, failed

    def start(self) -> None:
        """Begins to watch the connection. Any thread."""
        self._loop.call(self._start)

    def _start(self) -> None:
        if self.sock.fileno() >= 0:
            self._loop.watch(self.sock.fileno(), WRITE, self._ready)
            self._loop.later(self._timeout_s, self._check)

    def _ready(self, _: int) -> None:
        self._loop.unwatch(self.sock.fileno())
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            if not code and self.sock.getsockname() == self.sock.getpeername():
                # Nothing listens; the kernel has connected the socket with itself (simultaneous open, RFC 9293, 3.5).
                code = errno.ECONNREFUSED
            if not code and self._greet is not None:
                Greeter(self.sock, self._loop, self._greet(), self._done, self._on_failed).start()
                return
        except OSError as error:
            code = error.errno or errno.ENOTCONN
        if code:
            self._on_failed(TransportError(f"cannot connect to the receiver: {os.strerror(code)}"))
        else:
            self._done()

    def _done(self) -> None:
        self.connected = True
        self._on_connected()

    def _check(self) -> None:
        if not self.connected and self.sock.fileno() >= 0:
            self._on_failed(TransportStalled(f"the receiver did not answer within {self._timeout_s} s"))


def _stream(sock: socket.socket, tls: Tls | None, host: str) -> Stream:
    try:
        return dialled(sock, tls, host)
    except TlsError as error:
        sock.close()
        raise error.failure from error
    except BaseException:
        sock.close()
        raise
