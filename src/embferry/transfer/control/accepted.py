"""Peers that dial this end: the listening socket and a bounded table of connections.

A full table makes room instead of refusing: the connection that has been silent longest, for ``idle_time`` at least,
is closed. An end of a transfer speaks every second, so a silent connection is one that no transfer uses, or of a host
that is gone, or is held by a peer that means harm; its owner loses nothing by dialling again. A newcomer is most
likely a worker with a transfer; refusing it would let 1,024 silent connections stop the service.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from embferry.protocol.errors import CapacityError, EmbeddingTransferError
from embferry.transports.net.address import network_of
from embferry.transports.net.connector import set_keepalive
from embferry.transports.net.listener import Listener, listen

from .connection import Connection, Shared

log = logging.getLogger(__name__)

BACKLOG = 1024
RESTART_S = 1.0


@dataclass(frozen=True, eq=False)
class AcceptedPeer:
    """A peer that dialled this end, as long as its connection lasts.

    Attributes:
        address: Its IP address and port, for logs.
        network: The IPv4 address, or the IPv6 network, whose connections are counted together.
    """

    address: str
    network: str

    def __repr__(self) -> str:
        return f"<peer at {self.address}>"


class Acceptor:
    """Accepts connections and keeps them bounded. Driver thread only.

    Args:
        host: The IP address to listen on.
        port: The TCP port; 0 for any free one.

    Attributes:
        port: The TCP port.
        evicted: Connections that had to make room.
        refused: Connections closed because there was no room to make.

    Raises:
        LocalProtocolError: ``host`` is not an IP address.
        TransportError: The address cannot be bound.
    """

    def __init__(self, host: str, port: int, shared: Shared) -> None:
        self.evicted = self.refused = 0
        self._shared = shared
        self._sock = listen(host, port, BACKLOG)
        self.port: int = self._sock.getsockname()[1]
        self._greeting: OrderedDict[Connection, None] = OrderedDict()  # the oldest first
        self._open: OrderedDict[Connection, float] = OrderedDict()  # last frame or hello; the idlest first
        self._peers: dict[Hashable, Connection] = {}
        self._networks: dict[str, int] = {}
        self._closed = False
        self._listen()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, peer: Hashable) -> Connection | None:
        """Returns the connection of a peer, if it is open."""
        return self._peers.get(peer)

    def connections(self) -> list[Connection]:
        """Returns every connection."""
        return [*self._greeting, *self._open]

    def stop(self) -> None:
        """Closes the listening socket. Accepted connections stay open."""
        self._closed = True
        if not self._shared.loop.forked:
            with contextlib.suppress(OSError):  # the port is free even if a forked child has a copy
                self._sock.shutdown(socket.SHUT_RDWR)
        self._listener.stop()

    def _listen(self) -> None:
        if not self._closed:
            scope = self._shared.loop.scope(self._listener_failed)
            self._listener = Listener(self._sock, scope, "a peer", 1 << 30, self._on_accept)
            self._listener.start()

    def _listener_failed(self, error: BaseException) -> None:
        self._shared.loop.later(RESTART_S, self._listen)

    def _on_accept(self, sock: socket.socket, _: str) -> object:
        try:
            set_keepalive(sock)
            address, port = sock.getpeername()[:2]
            peer = AcceptedPeer(f"{address} port {port}", network_of(address))
            connection = Connection(sock, peer, self._shared.outgoing(), self._shared, self, repr(peer))
        except Exception as error:  # this connection only
            sock.close()
            log.log(
                logging.DEBUG if isinstance(error, OSError) else logging.ERROR,
                "could not take a connection", exc_info=error,
            )  # fmt: skip
            return None
        self._greeting[connection] = None
        if len(self._greeting) > self._shared.limits.handshakes:
            self.evicted += 1
            next(iter(self._greeting)).end(CapacityError("too many connections wait for their hello"))
        return None

    def on_open(self, connection: Connection) -> None:
        del self._greeting[connection]
        network = self._network_of(connection)
        limits = self._shared.limits
        if self._networks.get(network, 0) >= limits.connections_per_address:
            self._make_room(connection, network)
        elif len(self._open) >= limits.connections:
            self._make_room(connection, None)
        if connection.open:
            self._open[connection] = connection.opened_at
            self._peers[connection.peer] = connection
            self._networks[network] = self._networks.get(network, 0) + 1

    def on_frame(self, connection: Connection) -> None:
        self._open[connection] = self._shared.loop.now()
        self._open.move_to_end(connection)

    def on_end(self, connection: Connection, error: EmbeddingTransferError) -> None:
        self._shared.dropped += connection.outgoing.clear()
        self._greeting.pop(connection, None)
        if self._open.pop(connection, None) is None:
            return
        del self._peers[connection.peer]
        network = self._network_of(connection)
        self._networks[network] -= 1
        if not self._networks[network]:
            del self._networks[network]
        if connection.frames:  # otherwise the peer was never heard of
            self._shared.lost(connection.peer, error)

    def _make_room(self, newcomer: Connection, network: str | None) -> None:
        idlest = next(c for c in self._open if network is None or self._network_of(c) == network)
        if self._shared.loop.now() - self._open[idlest] < self._shared.limits.idle_time:
            self.refused += 1
            newcomer.end(CapacityError("too many connections, and none of them is idle"))
        else:
            self.evicted += 1
            idlest.end(CapacityError("this idle connection made room for another; dial again"))

    @staticmethod
    def _network_of(connection: Connection) -> str:
        assert isinstance(connection.peer, AcceptedPeer)
        return connection.peer.network
