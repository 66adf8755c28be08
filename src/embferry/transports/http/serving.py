"""The sending side's HTTP server: its connections, and the requests of :mod:`messages`.

The bytes of a write go from the source memory to the socket without a copy.
"""

from __future__ import annotations

import hmac
import logging
import math
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from functools import partial

from embferry.protocol.errors import TransportError, shown
from embferry.trust.digests import CONTENT_DIGEST, content_digest
from embferry.trust.keys import ClusterKeys
from embferry.trust.proof_checker import ProofChecker
from embferry.trust.requests import MAX_CHALLENGES, PROOF_HEADER, Accepted, Refused
from embferry.trust.tls import Tls

from ..net.cursor import Cursor
from ..net.listener import Listener, ListenLimits
from ..net.loop import READ, WRITE, Scope
from ..net.stream import Stream, unwatch
from . import heads, resource
from .connection import DROP_BYTES, Connection
from .heads import HttpError, Request
from .messages import SECRET_BYTES, parse_target, proof_context, proved_target
from .send_link import PublishedWrite, SendLink

log = logging.getLogger(__name__)

REQUEST_S = 10.0  # from the first byte of a request, or from the connection, to the end of its head
IDLE_S = 75.0  # between two requests
UNSENT_S = 30.0  # without progress in sending a response
LINGER_S = 2.0  # for the peer to read the last response before the connection is closed
CLOSING = (400, 403, 410, 413)  # statuses after which the connection ends
UNCHANGED = {"Cache-Control": "no-store, no-transform"}
METHODS = ("GET", "HEAD", "DELETE")

_WAIT = re.compile(r"(?:^|,)\s*wait=(\d{1,4})\s*(?:,|;|$)", re.A)


class ServerConnection(Connection):
    """A connection that was accepted: receives a request, sends its response, then receives the next one.

    Args:
        on_request: Called with each request; calls :meth:`send`, :meth:`refuse` or :meth:`park`.
        on_end: Called once, when the connection has been closed.

    Attributes:
        peer: Address and port of the client.
        proved: The last request, if it has proved the cluster key.
        unproved: Requests that were refused since the last one that was not.
    """

    def __init__(
        self,
        sock: Stream,
        peer: tuple[str, int],
        loop: Scope,
        on_request: Callable[[ServerConnection, Request], None],
        on_end: Callable[[ServerConnection], object],
    ) -> None:
        self.scope = loop.scope(self._failed)
        super().__init__(self.scope)
        self._sock, self.peer, self._on_request, self._on_end = sock, peer, on_request, on_end
        self.proved: Accepted | None = None
        self.unproved = 0
        self._source: PublishedWrite | None = None  # whose memory is being sent
        self._closes = self._lingers = False
        self._on_unpark: Callable[[], None] | None = None
        self._timeout.set(REQUEST_S)
        self._watch(READ)

    def send(
        self, status: int, headers: Mapping[str, str], body: Cursor | None = None, source: PublishedWrite | None = None
    ) -> None:
        """Responds to the last request. ``source`` is the write whose memory ``body`` refers to."""
        self._unpark()
        self._closes |= status in CLOSING
        if source is not None and body is not None and body.left:
            self._source = source
            source.readers.add(self.end)
        self._timeout.set(UNSENT_S)
        more = {"Connection": "close"} if self._closes else {}
        if self.proved is not None:
            more[PROOF_HEADER] = self.proved.answer_proof(status, headers.get(CONTENT_DIGEST))
        self._send(heads.write_response(status, {**headers, **more}), body)
        self._turn(WRITE)

    def refuse(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        """Responds with an error, which has no body. An honest client proves its request after few of them."""
        self.unproved += status == 401
        self._closes |= self.unproved > MAX_CHALLENGES
        self.send(status, {**(headers or {}), "Content-Length": "0"})

    def park(self, seconds: float, on_unpark: Callable[[], None]) -> None:
        """Postpones the response; it is 204 after ``seconds`` without a :meth:`send`.

        Calls ``on_unpark`` once, before the response is sent or when the connection has ended without one.
        """
        self._on_unpark = on_unpark
        self._timeout.set(seconds)

    def end(self, reason: str) -> None:
        if self._sock is None:
            return
        log.debug("closed the connection of %s: %s", self.peer, reason)
        self._close()
        self._release_source()
        try:
            self._unpark()
        finally:
            self._on_end(self)

    @property
    def has_ended(self) -> bool:
        return self._sock is None

    def make_room(self, reason: str) -> bool:
        """Ends an idle connection. One that is sending a write's bytes, or on which a poll waits, is not idle."""
        if self._source is not None or self._on_unpark is not None:
            return False
        self.end(reason)
        return True

    def _failed(self, error: BaseException) -> None:
        self.end(f"this end failed to handle it: {shown(error)}")

    def _unpark(self) -> None:
        on_unpark, self._on_unpark = self._on_unpark, None
        if on_unpark is not None:
            on_unpark()

    def _release_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.readers.discard(self.end)

    def _on_timeout(self) -> None:
        if self._on_unpark is not None:
            self.send(204, UNCHANGED)
        else:
            self.end("it timed out")

    def _on_error(self, error: HttpError | OSError) -> None:
        if isinstance(error, OSError):
            self.end(str(error))
        else:
            log.warning("rejected a request from %s: %s", self.peer, error)
            self.refuse(400)

    def _receive(self, sock: Stream) -> None:
        if self._lingers or self._on_unpark is not None:
            if not sock.recv(DROP_BYTES, 0 if self._lingers else socket.MSG_PEEK):
                self.end("the peer closed it")
            elif not self._lingers:
                unwatch(self._loop, sock)  # the next request is taken when the parked one has its response
            return
        head = self._receive_head(sock)
        if head is None:
            self._timeout.set(REQUEST_S)
            return
        self.proved = None
        request = heads.parse_request(head)
        self._closes = request.closes
        if heads.content_length(request.headers):
            self.refuse(413)  # no request here has a body
            return
        self._timeout.clear()
        self._on_request(self, request)

    def _on_bytes_sent(self, sock: Stream, left: int) -> None:
        self._lingers = self._closes and not left
        self._timeout.set(UNSENT_S if left else LINGER_S if self._lingers else IDLE_S)
        if not left:
            self._release_source()
        if self._lingers:
            # Closed later: unread bytes of the peer would cause a reset, which can overtake the response.
            sock.shutdown(socket.SHUT_WR)


class SenderServer:
    """Serves polls and the bytes of writes to all receivers. All but the constructor is for the loop's thread.

    Args:
        longest_wait_s: Upper limit of the time a poll may wait.
        keys: The cluster's, which requests must prove; None without any.
        tls: The certificate for connections; None: they are not encrypted.

    Attributes:
        secret: Every request must carry it, or prove it together with the cluster key.
        links: By the receiver's token in hexadecimal; the transport adds and removes them.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: Scope,
        longest_wait_s: float,
        limits: ListenLimits,
        keys: ClusterKeys | None,
        tls: Tls | None,
    ) -> None:
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._checker = (
            None if keys is None else ProofChecker(keys, proof_context(self.secret.hex()), "the http transport")
        )
        self.links: dict[str, SendLink] = {}
        self._longest_wait_s = longest_wait_s
        self._polls: dict[str, tuple[ServerConnection, int]] = {}  # pending, by token: connection and `after`
        self._stopped = False
        self.listener: Listener[ServerConnection] = Listener(
            sock,
            loop,
            "a receiver",
            limits,
            lambda sock, peer: ServerConnection(sock, peer, loop, self._on_request, self.listener.ended),
            tls=tls,
        )
        self.listener.start()

    def on_publish(self, token: str) -> None:
        """Responds to the receiver's pending poll, if there is one and a write to list in it."""
        poll = self._polls.get(token)
        if poll is not None:
            poll[0].scope.run(self._answer_pending, *poll, token)

    def is_polled(self, token: str) -> bool:
        return token in self._polls

    def stop(self) -> None:
        """Responds to pending polls with 410, then ends the listener and every connection."""
        self._stopped = True
        self.listener.stop()
        for connection, _ in list(self._polls.values()):
            connection.scope.run(connection.refuse, 410)
        for connection in self.listener.connections:
            connection.scope.run(connection.end, "the sender is closed")

    def _on_request(self, connection: ServerConnection, request: Request) -> None:
        target = parse_target(request.target)
        if not self._admit(connection, request):
            return
        self.listener.opened(connection)  # with the first of its requests
        self.listener.served(connection)
        if connection.has_ended:
            return
        if target is None:
            connection.refuse(404)
            return
        link = self.links.get(target.token)
        if link is not None:
            link.on_request(target.landed)
        if target.number is not None:
            write = None if link is None else link.find(target.number)
            self._respond_to_fetch(connection, request, target.outcome, write)
        elif request.method == "GET":
            # A receiver may poll before its link is made and after it has ended; it waits like any other.
            wait_s = min(_preferred_wait_s(request), self._longest_wait_s)
            self._respond_to_poll(connection, target.token, target.after, wait_s)
        elif request.method == "DELETE":
            if link is not None:
                link.end(TransportError("the receiver is closed"), lost=True)
            connection.send(204, {})
        else:
            connection.refuse(405, {"Allow": "GET, DELETE"})

    def _admit(self, connection: ServerConnection, request: Request) -> bool:
        """Returns whether the client may make this request. If not, it has its response."""
        authorization, digest = (request.headers.get(name) for name in ("authorization", CONTENT_DIGEST.lower()))
        if self._checker is None:
            if hmac.compare_digest((authorization or "").encode("latin-1"), b"Bearer " + self.secret.hex().encode()):
                return True
            log.warning("refused a request without the secret of this sender's address")
            connection.refuse(403)
            return False
        target, address = proved_target(request.target), connection.peer[0]
        verdict = self._checker.check(request.method, target, authorization, digest, address)
        if isinstance(verdict, Refused):
            connection.refuse(401, {"WWW-Authenticate": verdict.challenge})
            return False
        connection.proved, connection.unproved = verdict, 0
        return True

    def _respond_to_fetch(
        self, connection: ServerConnection, request: Request, outcome: str, write: PublishedWrite | None
    ) -> None:
        if write is None:
            connection.refuse(404)
            return
        entry = write.entry
        representation = resource.Representation(
            entry.length, entry.etag, entry.length, methods=METHODS, fixed=UNCHANGED
        )
        answer = resource.answer(request.method, request.headers, representation)
        if answer.status == 204:
            write.link.finish(entry.number, outcome)
        body = Cursor(write.views, answer.start, answer.stop)
        connection.send(answer.status, answer.headers, body, source=write)

    def _list_published(self, connection: ServerConnection, token: str, after: int) -> bool:
        """Responds with the writes above ``after``. Returns False, having done nothing, if there is none."""
        link = self.links.get(token)
        body = b"" if link is None else link.encode_published(after)
        if body:
            digest = {CONTENT_DIGEST: content_digest(body)}
            headers = {"Content-Type": "application/msgpack", "Content-Length": str(len(body)), **digest, **UNCHANGED}
            connection.send(200, headers, Cursor([memoryview(body)]))
        return bool(body)

    def _answer_pending(self, connection: ServerConnection, after: int, token: str) -> None:
        self._list_published(connection, token, after)

    def _respond_to_poll(self, connection: ServerConnection, token: str, after: int, wait_s: float) -> None:
        """Responds now if there is a write to list or ``wait_s`` is 0; otherwise waits for one."""
        if self._list_published(connection, token, after):
            return
        if self._stopped:
            connection.refuse(410)
        elif not wait_s:
            connection.send(204, UNCHANGED)
        else:
            if token in self._polls:  # the receiver has lost that connection, and a proxy keeps it open
                self._polls[token][0].send(204, UNCHANGED)
            self._polls[token] = (connection, after)
            connection.park(wait_s, partial(self._on_unpark, token))

    def _on_unpark(self, token: str) -> None:
        del self._polls[token]
        if token in self.links:
            self.links[token].on_request()  # the receiver's silence begins now


def _preferred_wait_s(request: Request) -> float:
    """Returns the seconds of ``Prefer: wait=``; infinity without it."""
    match = _WAIT.search(request.headers.get("prefer", ""))
    return math.inf if match is None else float(match[1])
