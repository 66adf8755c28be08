"""A listening socket on the loop, and its accepted connections, bounded in number."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Generic, TypeVar

from embferry.protocol.errors import TransportError

from . import address
from .loop import READ, Scope

log = logging.getLogger(__name__)

ACCEPT_PAUSE_S = 0.1
ACCEPTED_AT_ONCE = 64  # before other descriptors get their turn

C = TypeVar("C")


def listen(host: str, port: int, backlog: int = 128) -> socket.socket:
    """Returns a socket that listens on ``port`` of ``host``; port 0 means any free one.

    Args:
        host: An IP address of this host.
        port: The TCP port.
        backlog: Connections that the kernel makes before they are accepted.

    Raises:
        LocalProtocolError: ``host`` is not an IP address.
        TransportError: The port is taken, or the address is not of this host.
    """
    family = socket.AF_INET6 if address.own(host).version == 6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        raise TransportError(f"cannot listen on {host} port {port}: {error}") from error


class Listener(Generic[C]):
    """Accepts connections. Every method but ``start`` runs on the loop's thread.

    A connection that ends must be removed from :attr:`connections`.

    Args:
        sock: The listening socket; the listener closes it.
        loop: Watches the socket.
        peer_role: What connects, for the log: "a sender".
        most: Connections at a time; further ones are closed at once.
        on_accept: Makes a connection object of a socket and the peer's address. Called on the loop's thread.
    """

    def __init__(
        self, sock: socket.socket, loop: Scope, peer_role: str, most: int, on_accept: Callable[[socket.socket, str], C]
    ) -> None:
        self.sock = sock
        self.port: int = sock.getsockname()[1]
        self.connections: set[C] = set()
        self._loop, self._peer_role, self._most, self._on_accept = loop, peer_role, most, on_accept
        self._stopped = self._is_failing = False
        sock.setblocking(False)

    def start(self) -> None:
        """Begins to accept connections. Any thread."""
        self._loop.call(self._watch)

    def stop(self) -> None:
        """Closes the listening socket. Accepted connections stay open."""
        self._stopped = True
        self._loop.unwatch(self.sock.fileno())
        self.sock.close()

    def _watch(self) -> None:
        if not self._stopped:
            self._loop.watch(self.sock.fileno(), READ, self._accept)

    def _accept(self, events: int) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, peer = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # The peer has left already, or no descriptors are left; without a pause the latter would spin.
                level, self._is_failing = logging.DEBUG if self._is_failing else logging.WARNING, True
                log.log(level, "could not accept %s, trying every %s s: %s", self._peer_role, ACCEPT_PAUSE_S, error)
                self._loop.unwatch(self.sock.fileno())
                self._loop.later(ACCEPT_PAUSE_S, self._watch)
                return
            self._is_failing = False
            if len(self.connections) >= self._most:
                log.warning("refused %s at %s: %d are connected", self._peer_role, peer, self._most)
                sock.close()
                continue
            try:
                connection = self._on_accept(sock, str(peer))
            except OSError as error:  # the peer has left already, or the kernel has no room to watch it
                log.warning("could not take %s at %s: %s", self._peer_role, peer, error)
                sock.close()
                continue
            self.connections.add(connection)
