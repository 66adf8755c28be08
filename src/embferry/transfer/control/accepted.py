"""Peers that dial this end: the listener's connections, by peer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from embferry.protocol.errors import EmbeddingTransferError
from embferry.transports.net.listener import Listener, ListenLimits, listen
from embferry.transports.net.stream import Stream
from embferry.trust.greeting import Greeting

from .connection import Connection, Shared


@dataclass(frozen=True, eq=False)
class AcceptedPeer:
    """A peer that dialled this end, as long as its connection lasts.

    Attributes:
        address: Its IP address and port, for logs.
    """

    address: str

    def __repr__(self) -> str:
        return f"<peer at {self.address}>"


class Acceptor:
    """Accepts connections and keeps them bounded. Driver thread only.

    Args:
        host: The IP address to listen on.
        port: The TCP port; 0 for any free one.
        greet: Makes the greeting of a connection that is accepted.

    Attributes:
        listener: Bounds the connections.

    Raises:
        LocalProtocolError: ``host`` is not an IP address.
        TransportError: The address cannot be bound.
    """

    def __init__(self, host: str, port: int, shared: Shared, greet: Callable[[], Greeting]) -> None:
        self._shared = shared
        self._peers: dict[Hashable, Connection] = {}
        limits = shared.limits
        bounds = ListenLimits(
            limits.connections, limits.connections_per_address, limits.handshakes, limits.handshakes_per_address,
            limits.hello_timeout, limits.idle_time,
        )  # fmt: skip
        self.listener: Listener[Connection] = Listener(
            listen(host, port), shared.loop, "a peer", bounds, self._on_accept, greet=greet, tls=shared.trust.tls
        )
        self.listener.start()

    def get(self, peer: Hashable) -> Connection | None:
        """Returns the connection of a peer, if it is open."""
        return self._peers.get(peer)

    def serves(self, peer: Hashable) -> None:
        """A transfer uses the connection of a peer, which is therefore the last to make room."""
        if (connection := self._peers.get(peer)) is not None:
            self.listener.served(connection)

    def stop(self) -> None:
        """Closes the listening socket. Accepted connections stay open."""
        if not self._shared.loop.forked:
            with contextlib.suppress(OSError):  # the port is free even if a forked child has a copy
                self.listener.sock.shutdown(socket.SHUT_RDWR)
        self.listener.stop()

    def _on_accept(self, sock: Stream, address: tuple[str, int]) -> Connection:
        peer = AcceptedPeer(f"{address[0]} port {address[1]}")
        return Connection(sock, peer, self._shared.outgoing(), self._shared, self, repr(peer))

    def on_open(self, connection: Connection) -> None:
        self.listener.opened(connection)
        if connection.open:
            self._peers[connection.peer] = connection

    def on_frame(self, connection: Connection) -> None:
        pass  # a stranger can send frames too: what counts is whether a transfer uses the connection

    def on_end(self, connection: Connection, error: EmbeddingTransferError) -> None:
        self._shared.dropped += connection.outgoing.clear()
        if self.listener.ended(connection):
            del self._peers[connection.peer]
            if connection.frames:  # otherwise the peer was never heard of
                self._shared.lost(connection.peer, error)
