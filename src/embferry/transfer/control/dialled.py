"""A peer that this end dials: its name, the attempts to reach it, its connection, and what waits to be sent."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from functools import partial

from embferry.protocol.errors import (
    CapacityError,
    EmbeddingTransferError,
    PeerGone,
    TlsFailed,
    TransportError,
    VersionMismatch,
    WrongKey,
    shown,
)
from embferry.transports.net.connector import Connector
from embferry.transports.net.loop import Scope

from .connection import Connection, Shared
from .endpoint import demands_tls, host_and_port, is_address
from .names import Addresses, Resolver

log = logging.getLogger(__name__)

FIRST_DELAY_S, LONGEST_DELAY_S = 0.05, 1.0
UNKNOWN_NAME = (socket.EAI_NONAME, socket.EAI_NODATA) if hasattr(socket, "EAI_NODATA") else (socket.EAI_NONAME,)
FINAL = (VersionMismatch, WrongKey, TlsFailed)
"""Errors that another attempt would meet as well."""
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class DialledPeer:
    """One endpoint. Dials when there is something to send, and again when the connection breaks while it is needed.

    Args:
        endpoint: A checked endpoint.
        on_idle: Called when nothing is left of this peer: no connection, no attempt, no frame.
        on_gone: Called with the reason when the peer is given up, before ``on_idle``.

    Attributes:
        needed: Whether a transfer needs this peer.

    Raises:
        TlsFailed: The peer demands TLS, and this end has no certificate.
    """

    def __init__(
        self,
        endpoint: str,
        shared: Shared,
        resolver: Resolver,
        on_idle: Callable[[DialledPeer], None],
        on_gone: Callable[[DialledPeer, EmbeddingTransferError], None],
    ) -> None:
        self.endpoint = endpoint
        self.needed = True
        self._host, self._port = host_and_port(endpoint)
        self._tls = shared.trust.tls_for(demands_tls(endpoint))
        self._shared, self._resolver, self._on_idle, self._on_gone = shared, resolver, on_idle, on_gone
        self._outgoing = shared.outgoing()
        self._connection: Connection | None = None
        self._scope: Scope | None = None  # of the attempt under way
        self._connector: Connector | None = None
        self._failing_since: float | None = None
        self._delay_s = FIRST_DELAY_S
        self._error: EmbeddingTransferError = PeerGone("it was not dialled")  # the last one

    @property
    def connection(self) -> Connection | None:
        """The connection, if there is one."""
        return self._connection

    def send(self, encoded: bytes) -> bool:
        """Queues an encoded frame, and dials if need be. Returns False if the queue is full."""
        self.needed = True
        if self._connection is not None:
            return self._connection.send(encoded)
        queued = self._outgoing.add(encoded)
        if self._scope is None:
            self._dial()
        return queued

    def forget(self) -> None:
        """No transfer needs this peer. What is queued is still sent, if the peer can be reached in time."""
        self.needed = False
        if self._connection is None and not self._outgoing:
            self.end()

    def end(self) -> None:
        """Gives up connection and attempt, and drops what is queued."""
        self.needed = False
        self._shared.dropped += self._outgoing.clear()
        self._stop_attempt()
        if self._connection is not None:
            self._connection.end(PeerGone("this end closed the connection"), closed_here=True)
        else:
            self._on_idle(self)

    # Attempts

    def _dial(self) -> None:
        self._stop_attempt()
        if self._failing_since is None:
            self._failing_since = self._shared.loop.now()
        scope = self._scope = self._shared.loop.scope(self._bug)
        scope.run(self._begin, scope)

    def _begin(self, scope: Scope) -> None:
        if is_address(self._host):
            self._connect(scope, [(self._host, self._port)])
            return
        text = f"the lookup of {self._host} did not end within {self._shared.limits.connect_timeout:g} s"
        scope.later(self._shared.limits.connect_timeout, lambda: self._attempt_failed(PeerGone(text)))
        self._resolver.resolve(self._host, self._port, partial(self._resolved, scope))

    def _resolved(self, scope: Scope, found: Addresses | OSError) -> None:
        if scope is not self._scope:
            return  # an earlier attempt, given up
        if isinstance(found, OSError):
            error = PeerGone(f"the name {self._host} has no address: {found.strerror or found}")
            if isinstance(found, socket.gaierror) and found.errno in UNKNOWN_NAME:
                self._give_up(error)
            else:
                self._attempt_failed(error)
            return
        scope.end()
        self._scope = self._shared.loop.scope(self._bug)  # without the timer of the lookup
        self._connect(self._scope, found)

    def _connect(self, scope: Scope, addresses: Addresses, error: TransportError | None = None) -> None:
        """Tries the first of ``addresses``, then the others."""
        self._hang_up()
        if error is not None:
            self._error = error
        for index, address in enumerate(addresses):
            rest = addresses[index + 1 :]
            timeout_s = max(1.0, self._shared.limits.connect_timeout / len(addresses))
            failed = partial(self._connect, scope, rest)
            try:
                connected, greet = partial(self._connected, scope), self._shared.greet
                connector = Connector(address, scope, timeout_s, connected, failed, greet, self._tls, self._host)
            except TransportError as refused:
                self._error = refused
                continue
            self._connector = connector
            connector.start()
            return
        self._attempt_failed(self._error)

    def _connected(self, scope: Scope) -> None:
        connector, self._connector = self._connector, None
        if connector is None or scope is not self._scope:
            return
        sock = connector.sock
        try:
            self._connection = Connection(sock, self.endpoint, self._outgoing, self._shared, self, self.endpoint)
        except OSError as error:
            sock.close()
            self._attempt_failed(PeerGone(f"the connection broke at once: {error}"))
        else:
            self._shared.hellos.start(self._connection)
            self._stop_attempt()

    def _attempt_failed(self, error: EmbeddingTransferError) -> None:
        self._stop_attempt()
        self._error = error
        if not self.needed and not self._outgoing:
            self._on_idle(self)
            return
        now = self._shared.loop.now()
        since = self._failing_since = now if self._failing_since is None else self._failing_since
        if now + self._delay_s > since + self._shared.limits.connect_timeout or isinstance(error, FINAL):
            self._give_up(error)
            return
        self._scope = self._shared.loop.scope(self._bug)
        self._scope.later(self._delay_s, self._dial)
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)

    def _give_up(self, error: EmbeddingTransferError) -> None:
        self._stop_attempt()
        self._shared.dropped += self._outgoing.clear()
        tried_s = self._shared.loop.now() - (self._failing_since or self._shared.loop.now())
        text = f"{self.endpoint} cannot be reached ({tried_s:.1f} s of attempts): {error.detail}"
        cause = error.__cause__
        result: EmbeddingTransferError
        if isinstance(cause, OSError) and cause.errno in EXHAUSTED:
            result = CapacityError(f"{text}; raise this process's limits, above all that of open files (ulimit -n)")
        elif isinstance(error, FINAL):
            result = type(error)(text)
        else:
            result = PeerGone(f"{text}; check that its worker runs, and names and firewalls on the way to it")
        self._failing_since, self._delay_s = None, FIRST_DELAY_S
        self._on_gone(self, result)
        self._on_idle(self)

    def _stop_attempt(self) -> None:
        self._hang_up()
        if self._scope is not None:
            self._scope.end()
            self._scope = None

    def _hang_up(self) -> None:
        if self._connector is not None:
            sock, self._connector = self._connector.sock, None
            self._shared.loop.unwatch(sock.fileno())
            sock.close()

    def _bug(self, error: BaseException) -> None:
        self._attempt_failed(PeerGone(f"this end failed to dial: {shown(error)}"))

    # The connection

    def on_open(self, connection: Connection) -> None:
        log.debug("connected with %s", self.endpoint)

    def on_frame(self, connection: Connection) -> None:
        self._failing_since, self._delay_s = None, FIRST_DELAY_S  # the peer speaks: it is reached

    def on_end(self, connection: Connection, error: EmbeddingTransferError) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        self._outgoing.rewind()
        if not self.needed and not self._outgoing:
            self._on_idle(self)
            return
        if (
            connection.opened_at
            and self._shared.loop.now() - connection.opened_at > self._shared.limits.connect_timeout
        ):
            self._failing_since, self._delay_s = None, FIRST_DELAY_S
        self._attempt_failed(error)
