"""The greeting on a connected stream, on the loop; inside TLS, if the stream has it.

No byte beyond the greeting is read: what follows it is left in the stream for the owner.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable

from embferry.protocol.errors import TransportError
from embferry.trust.greeting import Greeting

from .loop import READ, WRITE, Scope
from .stream import Stream, unwatch, watch
from .tls_socket import TlsError, TlsSocket


class PeerLeftError(TransportError):
    """The connection ended before its greeting did: no fault of the peer, for example a probe of an open port."""


class Greeter:
    """Greets the peer of a socket. Loop thread only. When it is over, the socket is not watched any more.

    Args:
        sock: Connected and not blocking; never closed here. With TLS, the handshake comes first.
        loop: Watches the socket.
        greeting: Of this connection.
        on_done: Called once when the peer is one of the cluster.
        on_failed: Called once when it is not, or the connection broke; the caller closes the socket.
    """

    def __init__(
        self,
        sock: Stream,
        loop: Scope,
        greeting: Greeting,
        on_done: Callable[[], None],
        on_failed: Callable[[TransportError], None],
    ) -> None:
        self._sock, self._loop, self._greeting = sock, loop, greeting
        self._on_done, self._on_failed = on_done, on_failed

    def start(self) -> None:
        """Sends the hello, and begins to read."""
        if isinstance(self._sock, TlsSocket):
            watch(self._loop, self._sock, READ | WRITE, self._shaken)
        else:
            self._shaken(0)

    def _shaken(self, _: int) -> None:
        try:
            self._send(self._greeting.hello)
            watch(self._loop, self._sock, READ, self._ready)
        except BlockingIOError:
            return  # TLS is not done with its handshake
        except OSError as error:
            unwatch(self._loop, self._sock)
            self._on_failed(_broken(error))

    def _ready(self, _: int) -> None:
        received: bytes | None = None
        try:
            with contextlib.suppress(BlockingIOError):
                received = self._sock.recv(self._greeting.wanted)
            if received is None:
                return
            if not received:
                raise PeerLeftError("the peer closed the connection during the greeting")
            self._send(self._greeting.receive(received))
        except OSError as error:
            self._failed(_broken(error))
        except TransportError as error:
            self._failed(error)
        else:
            if self._greeting.done:
                unwatch(self._loop, self._sock)
                self._on_done()

    def _send(self, data: bytes) -> None:
        """Sends a message of the greeting. The socket is new, so it has room for all of them."""
        if data and self._sock.send(data) != len(data):
            raise OSError(errno.ENOBUFS, "no room for the greeting")

    def _failed(self, error: TransportError) -> None:
        unwatch(self._loop, self._sock)
        with contextlib.suppress(OSError):
            self._send(self._greeting.farewell)
        self._on_failed(error)


def _broken(error: OSError) -> TransportError:
    if isinstance(error, TlsError):
        return error.failure
    return PeerLeftError(f"the connection broke during the greeting: {error.strerror or error}")
