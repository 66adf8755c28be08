"""Bounds on the connections of an HTTP server: their number, in all and of one address, and how long one may wait.

A full server makes room instead of refusing: a connection that has no complete request is closed, the one that has
waited longest first. A client with an honest request delivers it soon after it has connected, so the others belong to
clients that are idle, slow or mean harm. A connection whose request is being answered stays.

Every connection has limited time for the head of its next request, also after earlier ones, and to take the end of a
response. With TLS, a connection is counted, and its time begins, when it is accepted: before the handshake
(:mod:`.tls_handshake`). The body of a request is read, and its pace checked, in :mod:`.body`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from embferry.serve.errors import ServeError
from embferry.serve.http.descriptors import Reports
from embferry.serve.http.errors import error_response
from embferry.transports.net.address import network_of
from embferry.trust.chunks import BoundedChunks
from embferry.trust.digests import MESSAGE_DIGEST
from embferry.trust.occasions import Occasions, more

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
"""Bytes of a request's first line and its headers."""
HEAD_SECONDS = 10.0
"""Seconds within which the head of a request must arrive: from the connecting, or from the end of the time that a
connection may be idle after a response."""
REST_SECONDS = 30.0
"""Seconds for the rest of a body whose request was answered early, as a refusal: a client that is still sending when
its connection closes would not see the answer."""
REFUSED_SECONDS = 1.0
"""Seconds from a refusal with 401 or 429 until the next request of its connection is taken, if that is there already:
without them, a few hundred connections full of requests without a key keep the event loop from all others. A client
that reads an answer before it asks again waits for nothing."""
OWN_SHARE = 8
"""Beyond all bounds, addresses of the fleet may have one connection for this many others."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds on the connections of one server.

    Attributes:
        connections: in all.
        per_address: of one IPv4 address, or of one IPv6 network of 64 bits.
        is_own: returns whether an address is one of the fleet's, for which room is kept.
    """

    connections: int = 4096
    per_address: int = 1024
    is_own: Callable[[str], bool] = lambda address: False


class Places:
    """The connections of a server by what they do. A connection is any hashable object.

    Attributes:
        evicted: connections that had to make room.
        refused: connections for which there was no room.
    """

    def __init__(self, limits: ConnectionLimits, close: Callable[[BoundedProtocol], None]) -> None:
        self._limits, self._close = limits, close
        self._networks: dict[BoundedProtocol, str] = {}
        self._counts: Counter[str] = Counter()
        self._idle: dict[BoundedProtocol, None] = {}  # without a request, the longest idle one first
        self._receiving: dict[BoundedProtocol, None] = {}  # whose body has not ended, the oldest first
        self.evicted = self.refused = 0

    def __len__(self) -> int:
        return len(self._networks)

    def __contains__(self, connection: BoundedProtocol) -> bool:
        return connection in self._networks

    def enter(self, connection: BoundedProtocol, address: str) -> bool:
        """Adds a connection, after room was made if necessary. Returns False if there is none."""
        network = counted_network(address)
        most, each = self._limits.connections, self._limits.per_address
        if self._limits.is_own(address):
            most, each = most + max(1, most // OWN_SHARE), most
        has_room = self._counts[network] < each or self._evict(network)
        if not (has_room and (len(self._networks) < most or self._evict(None))):
            self.refused += 1
            return False
        self._networks[connection] = network
        self._counts[network] += 1
        self._idle[connection] = None
        return True

    def leave(self, connection: BoundedProtocol) -> None:
        """Removes a connection. Idempotent."""
        network = self._networks.pop(connection, None)
        if network is None:
            return
        self._idle.pop(connection, None)
        self._receiving.pop(connection, None)
        self._counts[network] -= 1
        if not self._counts[network]:
            del self._counts[network]

    def turn(self, connection: BoundedProtocol, *, idle: bool = False, receiving: bool = False) -> None:
        """Notes what a connection does now; neither: its request is being answered."""
        if connection not in self._networks:
            return
        for is_so, kind in ((idle, self._idle), (receiving, self._receiving)):
            if not is_so:
                kind.pop(connection, None)
            elif connection not in kind:
                kind[connection] = None

    def _evict(self, network: str | None) -> bool:
        """Closes the connection that has waited longest, of ``network`` if given. Returns whether there was one."""
        for kind in (self._idle, self._receiving):
            for connection in kind:
                if network is None or self._networks[connection] == network:
                    self.leave(connection)
                    self._close(connection)
                    self.evicted += 1
                    return True
        return False


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol within the bounds of :class:`Places`. :func:`bounded_protocol` makes the class of a server."""

    conn: BoundedChunks
    places: Places
    reports: Reports
    malformed: Occasions
    _late: asyncio.TimerHandle | None = None
    _is_over = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = BoundedChunks(h11.SERVER, MAX_HEAD_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.logger = _ERRORS_ONLY
        if self not in self.places:
            self.admit(transport)

    def admit(self, transport: asyncio.Transport) -> bool:
        """Gives a connection that was accepted a place, and the time for its first head. Closes it if there is none."""
        self.transport = transport
        peer = transport.get_extra_info("peername")
        if not self.places.enter(self, str(peer[0]) if isinstance(peer, tuple) else ""):
            if self.reports.is_due():
                log.warning("a connection was refused: all %d are in use", len(self.places))
            transport.abort()
            return False
        self._limit(HEAD_SECONDS)
        return True

    def leave(self) -> None:
        """Gives the place back. Idempotent."""
        self._unlimit()
        self.places.leave(self)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is None or self.cycle.response_complete:
            return
        if self.cycle is not before:
            self._unlimit()
        self.places.turn(self, receiving=self.cycle.more_body)

    def on_response_complete(self) -> None:
        rest = REST_SECONDS if self.conn.their_state is h11.SEND_BODY else HEAD_SECONDS
        self._limit(self.timeout_keep_alive + rest)
        self.places.turn(self, idle=True)
        if self.conn.status in (401, 429) and self.conn.trailing_data[0]:
            self.loop.call_later(REFUSED_SECONDS, super().on_response_complete)
        else:
            super().on_response_complete()  # begins the next request if it is there

    def send_400_response(self, msg: str) -> None:
        """Refuses what h11 cannot read. Called while its error is being handled."""
        failed = sys.exception()
        if isinstance(failed, h11.RemoteProtocolError) and failed.error_status_hint == 431:
            error = ServeError("head_too_large", f"the head of the request is longer than {MAX_HEAD_BYTES:,} bytes")
        else:
            error = ServeError("invalid_request", f"this is not a request of HTTP/1.1: {failed or msg}")
        request_id = self._answer(error)
        if (count := self.malformed.count(error.code)) is not None:
            address = self.client[0] if self.client else "an unknown address"
            log.warning(
                "refused a request of %s: %s%s", address, error.detail, more(count), extra={"request_id": request_id}
            )
        self._drop_rest()

    def cut_off(self) -> bool:
        """Ends the connection when the server ends. Returns whether it had a request.

        A client whose request has no response yet is told. Not so a part: it expects a digest, and asks another worker.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.close()
            return False
        if cycle.response_started or MESSAGE_DIGEST in Headers(raw=self.headers):
            self._forget_request()
            self.transport.abort()
        else:
            why = "the server is shutting down; ask again"
            self._answer(ServeError("capacity_exhausted", why, status=503, retryable=True))
            self.transport.close()
        return True

    def _answer(self, error: ServeError) -> str:
        """Sends a response in place of the application, if none has begun. Returns the request's id."""
        self._forget_request()
        request_id, response = uuid.uuid4().hex, error_response(error)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [*response.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
            status, reason = response.status_code, STATUS_PHRASES[response.status_code]
            is_head = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason),
                h11.Data(data=b"" if is_head else bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        return request_id

    def _forget_request(self) -> None:
        """Ends the request for the application, as if its client had left."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _drop_rest(self) -> None:
        """Closes the connection when its client has read the response: one that is still sending would not see it."""
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self._is_over = True
        self.transport.write_eof()
        self.places.turn(self, idle=True)
        self._limit(REST_SECONDS)

    def data_received(self, data: bytes) -> None:
        if not self._is_over:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave()
        super().connection_lost(exc)

    def _limit(self, seconds: float) -> None:
        self._unlimit()
        self._late = self.loop.call_later(seconds, lambda: self.transport.abort())

    def _unlimit(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def bounded_protocol(limits: ConnectionLimits) -> type[BoundedProtocol]:
    """Returns the protocol of one server."""
    reports = Reports()

    def close(connection: BoundedProtocol) -> None:
        if reports.is_due():
            log.warning("too many connections are open; those without a request make room for others")
        connection.transport.abort()

    class Bounded(BoundedProtocol):
        pass

    Bounded.places, Bounded.reports, Bounded.malformed = Places(limits, close), reports, Occasions()
    return Bounded


_ERRORS_ONLY = logging.getLogger(f"{__name__}.uvicorn")
"""uvicorn warns of each request that is not HTTP, so a stranger could fill the log."""
_ERRORS_ONLY.setLevel(logging.ERROR)


def counted_network(address: str) -> str:
    """Returns the IPv4 address or the IPv6 network of 64 bits that an address counts for; "" for no IP address."""
    try:
        return network_of(address)
    except ValueError:  # the peer has left already, or the server listens on a Unix socket
        return ""


def caller_of(scope: Scope) -> str:
    """Returns the same for the client of a request."""
    return counted_network(scope["client"][0]) if scope.get("client") else ""
