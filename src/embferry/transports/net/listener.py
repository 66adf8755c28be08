"""A listening socket on the loop, and a bounded table of its connections.

A full table makes room instead of refusing: the connection that has served no transfer for longest is closed. A
connection that has served a transfer stays for ``idle_time`` afterwards; one that has served none may go at once. The
end of a running transfer speaks more often than that, so what is closed is idle, belongs to a lost host, or belongs to
an attacker. The owner of an idle connection loses nothing by connecting again. A newcomer is most likely a worker with
a transfer; refusing it would let a thousand useless connections stop the service.

The same is done when this process has no descriptor left for a newcomer.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Generic

from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.trust.greeting import Greeting
from embferry.trust.refusals import Refusals
from embferry.trust.tls import Tls

from ..contract import ConnectionCounts
from . import address
from .connector import set_keepalive
from .deadlines import Deadlines
from .greeter import PeerLeftError
from .loop import READ, Scope
from .newcomer import C, Newcomer
from .stream import Stream, accepted

log = logging.getLogger(__name__)

ACCEPT_PAUSE_S = 0.1
ACCEPTED_AT_ONCE = 64  # before other descriptors get their turn
LOCAL = "this host"  # the address of a peer behind a Unix socket
RESTART_S = 1.0
REPORT_S = 10.0  # between two log lines about the same bound
OF_DESCRIPTORS = 8
"""The open connections of one listener take at most this part of the process's descriptors, those that have not
introduced themselves half as much. So several listeners leave enough for everything else."""
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


@dataclass(frozen=True, slots=True)
class ListenLimits:
    """Bounds of one listener. Times are seconds.

    Raises:
        LocalProtocolError: A number is not greater than 0.
    """

    connections: int = 1024
    """Connections that have introduced themselves."""
    connections_per_address: int = 256
    """Such connections of one IPv4 address, or of one IPv6 network of 64 bits, which one host can have."""
    handshakes: int = 512
    """Connections that have not introduced themselves. They count from the moment they are accepted, before TLS."""
    handshakes_per_address: int = 256
    """Such connections of one IPv4 address, or of one IPv6 network of 64 bits."""
    hello_timeout: float = 5.0
    """Longest time until a connection has introduced itself."""
    idle_time: float = 10.0
    """Time since a connection has served a transfer, after which it may have to make room."""
    descriptors_each: int = 1
    """Descriptors that an open connection takes in this process."""

    def __post_init__(self) -> None:
        check_positive(self)

    def within_descriptors(self) -> ListenLimits:
        """Returns the same limits, lowered to the part that one listener may take of the process's descriptors."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return self
        most = max(4, soft // OF_DESCRIPTORS)
        open_most = max(4, most // self.descriptors_each)
        return replace(
            self,
            connections=min(self.connections, open_most),
            connections_per_address=min(self.connections_per_address, open_most),
            handshakes=min(self.handshakes, most // 2),
            handshakes_per_address=min(self.handshakes_per_address, most // 2),
        )


def check_positive(limits: object) -> None:
    """Raises LocalProtocolError unless every field of a dataclass is greater than 0."""
    for field in fields(limits):  # type: ignore[arg-type]  # a dataclass; typeshed has no public name for that
        value = getattr(limits, field.name)
        if not value > 0:
            raise LocalProtocolError(f"{field.name} must be greater than 0, not {value}")


DEFAULT_LIMITS = ListenLimits()


def listen(host: str, port: int, backlog: int = 1024) -> socket.socket:
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
    """Accepts connections and bounds them. Every method but ``start`` runs on the loop's thread.

    A connection says when its peer has introduced itself (:meth:`opened`), served a transfer (:meth:`served`) and gone
    (:meth:`ended`). An exception of ``on_accept`` harms its connection only.

    Args:
        sock: The listening socket; the listener closes it.
        loop: Watches the socket, in a scope of its own.
        peer_role: What connects, for the log: "a sender".
        limits: Lowered to what the process's limit of descriptors allows.
        on_accept: Makes a connection object of a socket, or with ``tls`` of a :class:`.tls_socket.TlsSocket`, and the
            peer's IP address and port. Called on the loop's thread.
        keepalive: Whether the kernel ends connections of hosts that are gone.
        greet: Makes the greeting of a new connection, which comes before ``on_accept``; None: peers do not greet.
        tls: The certificate for new connections; None: they are not encrypted.

    Attributes:
        evicted: Connections closed so far to make room.
        refused: Connections closed so far because there was no room to make.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: Scope,
        peer_role: str,
        limits: ListenLimits,
        on_accept: Callable[[Any, tuple[str, int]], C],
        *,
        keepalive: bool = True,
        greet: Callable[[], Greeting] | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.sock = sock
        self.port: int = sock.getsockname()[1]
        self.limits = limits.within_descriptors()
        self.evicted = self.refused = 0
        self._loop, self._peer_role, self._on_accept, self._keepalive = loop, peer_role, on_accept, keepalive
        self._greet, self._tls = greet, tls
        self._newcomers: OrderedDict[Newcomer[C], str] = OrderedDict()  # with the network; the oldest first
        self._newcomers_of: Counter[str] = Counter()  # by network
        self._newcomer_of: dict[C, Newcomer[C]] = {}
        self._hellos: Deadlines[Newcomer[C]] = Deadlines(loop, self.limits.hello_timeout, self._no_hello)
        self._open: OrderedDict[C, float] = OrderedDict()  # when it served last, or was opened; the longest ago first
        self._has_served: set[C] = set()
        self._network_of: dict[C, str] = {}
        self._networks: dict[str, int] = {}
        self._reported_at = -REPORT_S
        self._refusals = Refusals(f"port {self.port}", "a connection", loop.now)
        self._stopped = False
        self._scope = loop.scope(self._failed)
        sock.setblocking(False)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def counts(self) -> ConnectionCounts:
        return ConnectionCounts(len(self._open), self.evicted, self.refused)

    @property
    def connections(self) -> list[C]:
        """Every connection that ``on_accept`` has made, also before it has introduced itself."""
        return [*self._newcomer_of, *self._open]

    def start(self) -> None:
        """Begins to accept connections. Any thread."""
        self._scope.call(self._watch)  # in this scope, so that a watch that fails is tried again

    def stop(self) -> None:
        """Closes the listening socket. The connections that ``on_accept`` has made stay open."""
        self._stopped = True
        for newcomer in list(self._newcomers):
            if newcomer.connection is None:
                newcomer.close()
                self._forget(newcomer)
        self._loop.unwatch(self.sock.fileno())
        self.sock.close()

    def opened(self, connection: C) -> None:
        """The peer has introduced itself. The connection is ended if there is no room for it."""
        newcomer = self._newcomer_of.pop(connection, None)
        if newcomer is None:
            return
        network = self._forget(newcomer)
        if self._networks.get(network, 0) >= self.limits.connections_per_address:
            has_room = self._evict_idlest(network)
        else:
            has_room = len(self._open) < self.limits.connections or self._evict_idlest(None)
        if not has_room:
            self.refused += 1
            self._report("refused one: %d connections are open, and transfers use all of them", len(self._open))
            self._make_room(connection, "too many connections, and transfers use all of them")
            return
        self._open[connection] = self._loop.now()
        self._network_of[connection] = network
        self._networks[network] = self._networks.get(network, 0) + 1

    def served(self, connection: C) -> None:
        """The connection serves a transfer now: it was invited to one, or has carried what one can use."""
        if connection in self._open:
            self._open[connection] = self._loop.now()
            self._open.move_to_end(connection)
            self._has_served.add(connection)

    def ended(self, connection: C) -> bool:
        """The connection is closed. Returns whether it had introduced itself, and had a place."""
        newcomer = self._newcomer_of.pop(connection, None)
        if newcomer is not None:
            self._forget(newcomer)
        if self._open.pop(connection, None) is None:
            return False
        self._has_served.discard(connection)
        network = self._network_of.pop(connection)
        self._networks[network] -= 1
        if not self._networks[network]:
            del self._networks[network]
        return True

    def _failed(self, error: BaseException) -> None:
        self._scope = self._loop.scope(self._failed)
        self._scope.later(RESTART_S, self._watch)

    def _watch(self) -> None:
        if not self._stopped:
            self._scope.watch(self.sock.fileno(), READ, self._accept)

    def _accept(self, events: int) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, peer = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # The peer has left already, or there is no descriptor; without a pause the latter would spin.
                if error.errno in OUT_OF_RESOURCES and self._evict_any():
                    continue
                self._report("could not accept one, trying again in %s s: %s", ACCEPT_PAUSE_S, error)
                self._scope.unwatch(self.sock.fileno())
                self._scope.later(ACCEPT_PAUSE_S, self._watch)
                return
            self._take(sock, (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else (LOCAL, 0))

    def _take(self, sock: socket.socket, peer: tuple[str, int]) -> None:
        try:
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # the peer may have left already; reading will tell
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._keepalive:
                    set_keepalive(sock)
            stream = accepted(sock, self._tls)
        except Exception as error:  # noqa: BLE001  (this connection only; it is logged)
            self._could_not_take(sock, peer, error)
            return
        newcomer: Newcomer[C] = Newcomer(stream, peer)
        network = LOCAL if peer[0] == LOCAL else address.network_of(peer[0])
        self._newcomers[newcomer] = network
        self._newcomers_of[network] += 1
        self._hellos.start(newcomer)
        if self._greet is None:
            self._greeted(newcomer)
        else:
            done, failed = partial(self._greeted, newcomer), partial(self._not_greeted, newcomer)
            newcomer.greet(self._greet(), self._loop, done, failed)
        if self._newcomers_of[network] > self.limits.handshakes_per_address:
            self._evict_newcomer("too many connections of its address have not introduced themselves", network)
        elif len(self._newcomers) > self.limits.handshakes:
            self._evict_newcomer("too many connections have not introduced themselves")

    def _greeted(self, newcomer: Newcomer[C]) -> None:
        try:
            connection = self._on_accept(newcomer.sock, newcomer.peer)
        except Exception as error:  # noqa: BLE001  (this connection only; it is logged)
            self._forget(newcomer)
            self._could_not_take(newcomer.sock, newcomer.peer, error)
            return
        newcomer.connection = connection
        self._newcomer_of[connection] = newcomer

    def _not_greeted(self, newcomer: Newcomer[C], error: TransportError) -> None:
        self._forget(newcomer)
        log.debug("closed a connection of %s at %s: %s", self._peer_role, newcomer.peer, error)
        if not isinstance(error, PeerLeftError):
            self._refusals.report(f"{self._peer_role} at {newcomer.peer[0]}", error.detail)

    def _could_not_take(self, sock: Stream, peer: tuple[str, int], error: Exception) -> None:
        sock.close()
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        log.log(level, "could not take a connection of %s at %s", self._peer_role, peer, exc_info=error)

    def _forget(self, newcomer: Newcomer[C]) -> str:
        """Takes a newcomer out. Returns its network."""
        self._hellos.stop(newcomer)
        network = self._newcomers.pop(newcomer, None)
        if network is None:
            return LOCAL
        self._newcomers_of[network] -= 1
        if not self._newcomers_of[network]:
            del self._newcomers_of[network]
        return network

    def _no_hello(self, newcomer: Newcomer[C]) -> None:
        why = f"it did not introduce itself within {self.limits.hello_timeout:g} s"
        if self._make_room(newcomer, why):
            self._refusals.report(f"{self._peer_role} at {newcomer.peer[0]}", why)

    def _make_room(self, one: C | Newcomer[C], reason: str) -> bool:
        try:
            if not one.make_room(reason):
                return False
        except Exception:
            log.exception("a connection of %s could not be ended", self._peer_role)
        if not isinstance(one, Newcomer):
            self.ended(one)  # now, because some take a while to end
        elif one.connection is not None:
            self.ended(one.connection)
        else:
            self._forget(one)
        return True

    def _evict_any(self) -> bool:
        return self._evict_newcomer("this process has no descriptors left") or self._evict_idlest(None)

    def _evict_newcomer(self, reason: str, network: str | None = None) -> bool:
        """Ends the connection, of ``network`` if given, that has waited longest to introduce itself."""
        oldest = next((one for one, its in self._newcomers.items() if network in (None, its)), None)
        if oldest is None or not self._make_room(oldest, reason):
            return False
        self.evicted += 1
        self._report("closed the one that has waited longest to introduce itself: %s", reason)
        return True

    def _evict_idlest(self, network: str | None) -> bool:
        """Ends the connection that has served no transfer for longest, of ``network`` if given.

        Returns:
            Whether there was one that no transfer uses.
        """
        now = self._loop.now()
        for connection, served_at in list(self._open.items()):
            if connection in self._has_served and now - served_at < self.limits.idle_time:
                continue
            mine = network is None or self._network_of[connection] == network
            if mine and self._make_room(connection, "this connection, of no transfer, made room; connect again"):
                self.evicted += 1
                return True
        return False

    def _report(self, text: str, *values: object) -> None:
        """Logs something that a peer can cause as often as it likes."""
        now = self._loop.now()
        if now - self._reported_at >= REPORT_S:
            self._reported_at = now
            log.warning("connections of %s at port %d: " + text, self._peer_role, self.port, *values)
