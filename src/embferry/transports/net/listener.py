"""Who connects to us: a listening socket on the loop, and the connections that came of it, a bounded number."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Generic, TypeVar

from embferry.protocol.errors import TransportError

from . import address
from .loop import READ, Loop

log = logging.getLogger(__name__)

ACCEPT_PAUSE_S = 0.1

C = TypeVar("C")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``port`` of ``host``; 0: any that is free.

    :raises LocalProtocolError: ``host`` is no IP address.
    :raises TransportError: the port is taken, or the address is not ours.
    """
    family = socket.AF_INET6 if address.own(host).version == 6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise TransportError(f"cannot listen on {host} port {port}: {error}") from error


class Listener(Generic[C]):
    """All but ``start`` is for the loop's thread. Whoever ends a connection takes it out of :attr:`connections`.

    :param sock: its to close.
    :param who: connects, for the log: "a sender".
    :param most: connections at a time; who comes then is hung up on.
    :param welcome: makes a connection of its socket and the peer's address.
    """

    def __init__(
        self, sock: socket.socket, loop: Loop, who: str, most: int, welcome: Callable[[socket.socket, str], C]
    ) -> None:
        self.sock = sock
        self.port: int = sock.getsockname()[1]
        self.connections: set[C] = set()
        self._loop, self._who, self._most, self._welcome = loop, who, most, welcome
        self._stopped = False
        sock.setblocking(False)

    def start(self) -> None:
        """From any thread: the caller is ready for connections."""
        self._loop.call(self._watch)

    def stop(self) -> None:
        """Listens no more. The connections are not touched."""
        self._stopped = True
        self._loop.unwatch(self.sock.fileno())
        self.sock.close()

    def _watch(self) -> None:
        if not self._stopped:
            self._loop.watch(self.sock.fileno(), READ, self._accept)

    def _accept(self, _: int) -> None:
        while True:
            try:
                sock, peer = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # The peer left already, or no descriptors are left; the latter would make this spin.
                log.warning("could not accept %s, trying again in %s s: %s", self._who, ACCEPT_PAUSE_S, error)
                self._loop.unwatch(self.sock.fileno())
                self._loop.later(ACCEPT_PAUSE_S, self._watch)
                return
            if len(self.connections) >= self._most:
                log.warning("refused %s at %s: %d are connected", self._who, peer, self._most)
                sock.close()
                continue
            self.connections.add(self._welcome(sock, str(peer)))
