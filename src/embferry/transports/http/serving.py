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

from embferry.protocol.errors import TransportError

from ..net.cursor import IOV_MAX, Cursor
from ..net.listener import Listener
from ..net.loop import READ, WRITE, Scope, Timeout
from . import heads, resource
from .heads import HttpError, Request
from .messages import SECRET_BYTES, parse_target
from .send_link import PublishedWrite, SendLink

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
REQUEST_S = 10.0  # from the first byte of a request, or from the connection, to the end of its head
IDLE_S = 75.0  # between two requests
UNSENT_S = 30.0  # without progress in sending a response
LINGER_S = 2.0  # for the peer to read the last response before the connection is closed
TURN_BYTES = 32 << 20  # sent to one receiver before other connections get their turn
EMPTY = {"Content-Length": "0"}
UNCHANGED = {"Cache-Control": "no-store, no-transform"}
METHODS = ("GET", "HEAD", "DELETE")

_WAIT = re.compile(r"(?:^|,)\s*wait=(\d{1,4})\s*(?:,|;|$)", re.A)


class ServerConnection:
    """A connection that was accepted: reads a request, sends its response, then reads the next one.

    Pipelined requests are served in order. All methods are for the loop's thread.

    Args:
        on_request: Called with each request; calls :meth:`send` or :meth:`park`.
        on_end: Called once, when the connection has been closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        loop: Scope,
        on_request: Callable[[ServerConnection, Request], None],
        on_end: Callable[[ServerConnection], None],
    ) -> None:
        self._sock, self._peer, self._loop, self._on_request, self._on_end = sock, peer, loop, on_request, on_end
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()
        self._unsent: list[Cursor] = []  # of the response that is being sent: its head, and its body if it has one
        self._source: PublishedWrite | None = None  # whose memory the body is
        self._closes = self._lingers = self._ended = False
        self._on_unpark: Callable[[], None] | None = None
        self._timeout = Timeout(loop, self._on_timeout)
        self._timeout.set(REQUEST_S)
        loop.watch(sock.fileno(), READ, self._on_ready)

    def send(
        self, status: int, headers: Mapping[str, str], body: Cursor | None = None, source: PublishedWrite | None = None
    ) -> None:
        """Responds to the last request. ``source`` is the write whose memory ``body`` refers to."""
        self._unpark()
        self._closes |= status in (400, 403, 410, 413)
        head = heads.write_response(status, {**headers, **({"Connection": "close"} if self._closes else {})})
        self._unsent = [Cursor([memoryview(head)])]
        if body is not None and body.left:
            self._unsent.append(body)
            if source is not None:
                self._source = source
                source.readers.add(self.end)
        self._timeout.set(UNSENT_S)
        self._loop.watch(self._sock.fileno(), WRITE, self._on_ready)
        self._guarded(self._flush)

    def park(self, seconds: float, on_unpark: Callable[[], None]) -> None:
        """Postpones the response; it is 204 after ``seconds`` without a :meth:`send`.

        Calls ``on_unpark`` once, before the response is sent or when the connection has ended without one.
        """
        self._on_unpark = on_unpark
        self._timeout.set(seconds)

    def end(self, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        log.debug("closed the connection of %s: %s", self._peer, reason)
        self._timeout.clear()
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._release()
        self._unpark()
        self._on_end(self)

    def _unpark(self) -> None:
        on_unpark, self._on_unpark = self._on_unpark, None
        if on_unpark is not None:
            on_unpark()

    def _release(self) -> None:
        """Drops the response and its reference to the source memory."""
        for part in self._unsent:
            part.release()
        self._unsent = []
        if self._source is not None:
            self._source.readers.discard(self.end)
            self._source = None

    def _on_ready(self, events: int) -> None:
        if not self._ended:
            self._guarded(self._receive if events & READ else self._flush)

    def _on_timeout(self) -> None:
        if self._on_unpark is not None:
            self.send(204, UNCHANGED)
        else:
            self.end("it timed out")

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BlockingIOError:
            return
        except HttpError as error:
            log.warning("rejected a request from %s: %s", self._peer, error)
            self._received.clear()
            self._closes = True
            self.send(400, EMPTY)
        except OSError as error:
            self.end(str(error))

    def _receive(self) -> None:
        data = self._sock.recv(heads.MAX_HEAD_BYTES)
        if not data:
            self.end("the peer closed it")
        elif not self._lingers:
            self._received += data
            self._take_request()

    def _take_request(self) -> None:
        if self._ended or self._unsent:
            return
        length = heads.head_length(self._received)
        if self._on_unpark is not None:
            return  # the next request is taken when the parked one has its response
        if length < 0:
            if self._received:
                self._timeout.set(REQUEST_S)
            return
        request = heads.parse_request(bytes(self._received[:length]))
        del self._received[: length + len(heads.END)]
        self._closes = request.closes
        if heads.content_length(request.headers):
            self.send(413, EMPTY)  # no request here has a body
            return
        self._timeout.clear()
        self._on_request(self, request)

    def _flush(self) -> None:
        budget = TURN_BYTES
        while self._unsent and budget > 0:
            sent = self._sock.sendmsg([view for part in self._unsent for view in part.views()][:IOV_MAX])
            budget -= sent
            self._timeout.set(UNSENT_S)
            if self._source is not None:
                self._source.link.on_bytes_sent()
            for part in self._unsent:
                of_part = min(sent, part.left)
                part.advance(of_part)
                sent -= of_part
            if not self._unsent[-1].left:
                self._on_sent()

    def _on_sent(self) -> None:
        self._release()
        self._loop.watch(self._sock.fileno(), READ, self._on_ready)
        if self._closes:
            # Closed later: unread bytes of the peer would cause a reset, which can overtake the response.
            self._lingers = True
            self._sock.shutdown(socket.SHUT_WR)
            self._timeout.set(LINGER_S)
        else:
            self._timeout.set(IDLE_S)
            self._loop.call(partial(self._guarded, self._take_request))


class SenderServer:
    """Serves polls and the bytes of writes to all receivers. All but the constructor is for the loop's thread.

    Args:
        longest_wait_s: Upper limit of the time a poll may wait.

    Attributes:
        secret: Every request must carry it.
        links: By the receiver's token in hexadecimal; the transport adds and removes them.
    """

    def __init__(self, sock: socket.socket, loop: Scope, longest_wait_s: float) -> None:
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.links: dict[str, SendLink] = {}
        self._longest_wait_s = longest_wait_s
        self._polls: dict[str, tuple[ServerConnection, int]] = {}  # pending, by token: connection and `after`
        self._stopped = False
        self.listener = Listener(
            sock,
            loop,
            "a receiver",
            MAX_CONNECTIONS,
            lambda sock, peer: ServerConnection(sock, peer, loop, self._on_request, self.listener.connections.discard),
        )
        self.listener.start()

    def on_publish(self, token: str) -> None:
        """Responds to the receiver's pending poll, if there is one and a write to list in it."""
        poll = self._polls.get(token)
        if poll is not None:
            self._respond_to_poll(poll[0], token, poll[1], 0.0)

    def is_polled(self, token: str) -> bool:
        return token in self._polls

    def stop(self) -> None:
        """Responds to pending polls with 410, then ends the listener and every connection."""
        self._stopped = True
        self.listener.stop()
        for connection, _ in list(self._polls.values()):
            connection.send(410, EMPTY)
        for connection in list(self.listener.connections):
            connection.end("the sender is closed")

    def _on_request(self, connection: ServerConnection, request: Request) -> None:
        target = parse_target(request.target)
        authorization = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(authorization, b"Bearer " + self.secret.hex().encode()):
            log.warning("refused a request without the secret of this sender's address")
            connection.send(403, EMPTY)
            return
        if target is None:
            connection.send(404, EMPTY)
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
            connection.send(405, {"Allow": "GET, DELETE", **EMPTY})

    def _respond_to_fetch(
        self, connection: ServerConnection, request: Request, outcome: str, write: PublishedWrite | None
    ) -> None:
        if write is None:
            connection.send(404, EMPTY)
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

    def _respond_to_poll(self, connection: ServerConnection, token: str, after: int, wait_s: float) -> None:
        """Responds now if there is a write to list; otherwise waits for one, unless ``wait_s`` is 0."""
        link = self.links.get(token)
        body = b"" if link is None else link.encode_published(after)
        if body:
            headers = {"Content-Type": "application/msgpack", "Content-Length": str(len(body)), **UNCHANGED}
            connection.send(200, headers, Cursor([memoryview(body)]))
        elif self._stopped:
            connection.send(410, EMPTY)
        elif wait_s:
            if token in self._polls:  # the receiver has lost that connection, and a proxy keeps it open
                self._polls[token][0].send(204, UNCHANGED)
            self._polls[token] = (connection, after)
            connection.park(wait_s, partial(self._on_unpark, token))

    def _on_unpark(self, token: str) -> None:
        del self._polls[token]
        if token in self.links:
            self.links[token].on_request()  # the receiver's silence begins now


def _preferred_wait_s(request: Request) -> float:
    """Returns the seconds of ``Prefer: wait=``, at least 1; infinity without it."""
    match = _WAIT.search(request.headers.get("prefer", ""))
    return math.inf if match is None else max(float(match[1]), 1.0)
