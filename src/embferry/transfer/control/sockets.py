"""The control plane over TCP: frames on connections that the driver's own loop serves.

A message is one system call on each side and wakes one thread on each side.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial

from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, PeerGone, TlsFailed
from embferry.transports.net import address
from embferry.transports.net.loop import Loop
from embferry.trust import Trust
from embferry.trust.greeting import Channel, Role

from .accepted import Acceptor
from .connection import Shared
from .contract import ControlPlane, Received, Unreachable
from .dialled import DialledPeer
from .endpoint import check_endpoint, tcp_endpoint
from .framing import frame
from .limits import DEFAULTS, ControlLimits
from .names import Resolver


class SocketControl(ControlPlane):
    """Listens (if ``host`` is given), dials, and exchanges frames. Driver thread only, except the constructor.

    In a forked child, nothing can be sent, and ``close`` closes the child's copies without disturbing the parent.

    Args:
        loop: The driver's loop; the plane never runs or closes it.
        host: The IP address to listen on; None: this end only dials.
        port: The TCP port to listen on; 0 for any free one.
        advertise: The host that peers dial, if it differs from ``host``.
        limits: Bounds on what peers can make this process hold.
        trust: The keys that peers must know, whether strangers may be let in, and the certificate; None: what the
            environment says.

    Raises:
        LocalProtocolError: ``host`` is not an IP address, or strangers can reach it and there is no key, or peers
            cannot dial ``advertise``.
        TransportError: The port cannot be bound.
        TlsFailed: The certificate is not for the host that peers dial.
    """

    def __init__(
        self,
        loop: Loop,
        host: str | None = None,
        port: int = 0,
        advertise: str | None = None,
        limits: ControlLimits = DEFAULTS,
        trust: Trust | None = None,
    ) -> None:
        trust = Trust.or_environment(trust)
        self._limits = limits
        self._shared = Shared(loop, limits, partial(trust.greeting, Role.DIALER, Channel.CONTROL), trust)
        self._resolver = Resolver(loop.call)
        self._dialled: dict[str, DialledPeer] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # forgotten ones, the longest forgotten first
        self._closed = False
        if advertise is not None:
            check_endpoint(tcp_endpoint(advertise, 1))
        self._acceptor: Acceptor | None = None
        if host is not None:
            address.own(host.strip("[]"))
            trust.check_listening(host, "the control port")
            trust.check_host(advertise or host, "the control port")
            greet = partial(trust.greeting, Role.ACCEPTOR, Channel.CONTROL)
            self._acceptor = Acceptor(host.strip("[]"), port, self._shared, greet)
            scheme = "tls" if trust.demands_tls else "tcp"
            self.endpoint = tcp_endpoint(advertise or host, self._acceptor.listener.port, scheme)
        self._stop_flushing = loop.before_wait(self._shared.flush)

    @property
    def dropped_frames(self) -> int:
        return self._shared.dropped

    @property
    def connections(self) -> int:
        """Accepted connections now."""
        return len(self._acceptor.listener) if self._acceptor is not None else 0

    @property
    def evicted_connections(self) -> int:
        """Accepted connections closed so far to make room for others."""
        return self._acceptor.listener.evicted if self._acceptor is not None else 0

    @property
    def refused_connections(self) -> int:
        """Accepted connections closed so far because there was no room to make."""
        return self._acceptor.listener.refused if self._acceptor is not None else 0

    @property
    def bad_frames(self) -> int:
        """Damaged or impossible frames received so far."""
        return self._shared.bad_frames

    def send(self, peer: Hashable, data: bytes) -> None:
        if not 1 <= len(data) <= self._limits.frame_bytes:
            raise LocalProtocolError(
                f"a control frame of {len(data)} bytes; 1 to {self._limits.frame_bytes} are allowed"
            )
        if self._closed or self._shared.loop.forked or not self._queue(peer, frame(data)):
            self._shared.dropped += 1

    def poll(self) -> list[Received | Unreachable]:
        events, self._shared.events = self._shared.events, []
        self._shared.received_bytes = 0
        return events

    def flush(self) -> None:
        self._shared.flush()

    def forget(self, peer: Hashable) -> None:
        dialled = self._dialled.get(peer) if isinstance(peer, str) else None
        if dialled is None or not dialled.needed:
            return
        self._idle[dialled.endpoint] = None
        dialled.forget()
        if len(self._idle) > self._limits.idle_connections:
            self._dialled[next(iter(self._idle))].end()

    def serves(self, peer: Hashable) -> None:
        if self._acceptor is not None:
            self._acceptor.serves(peer)

    def close(self, linger_s: float = 0.2) -> None:
        if self._closed:
            return
        self._closed = True
        self._stop_flushing()
        loop = self._shared.loop
        until = time.monotonic() + linger_s
        if self._acceptor is not None:
            self._acceptor.stop()
        if not loop.forked:
            self._shared.flush()
        open_now = [peer.connection for peer in self._dialled.values() if peer.connection is not None]
        accepted = self._acceptor.listener.connections if self._acceptor is not None else []
        for connection in (*open_now, *accepted):
            if not loop.forked:
                loop.run(connection.push_within, until - time.monotonic())
        for peer in list(self._dialled.values()):
            loop.run(peer.end)
        for connection in accepted:
            loop.run(partial(connection.end, closed_here=True), PeerGone("this end was closed"))
        self._shared.events.clear()

    def _queue(self, peer: Hashable, encoded: bytes) -> bool:
        if not isinstance(peer, str):
            connection = self._acceptor.get(peer) if self._acceptor is not None else None
            return connection is not None and connection.send(encoded)
        dialled = self._dialled.get(peer)
        if dialled is None:
            try:
                dialled = DialledPeer(peer, self._shared, self._resolver, self._on_idle, self._on_gone)
            except (LocalProtocolError, TlsFailed) as error:
                self._shared.lost(peer, error)
                return False
            self._dialled[peer] = dialled
        self._idle.pop(peer, None)
        return dialled.send(encoded)

    def _on_idle(self, peer: DialledPeer) -> None:
        if self._dialled.get(peer.endpoint) is peer:
            del self._dialled[peer.endpoint]
            self._idle.pop(peer.endpoint, None)

    def _on_gone(self, peer: DialledPeer, error: EmbeddingTransferError) -> None:
        if peer.needed:
            self._shared.lost(peer.endpoint, error)
