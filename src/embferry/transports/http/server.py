"""The sending side: listens, and answers what :mod:`wire` says a receiver may ask."""

from __future__ import annotations

import hmac
import logging
import math
import re
import secrets
import socket

from embferry.protocol.errors import TransportError

from ..net.cursor import Cursor
from ..net.listener import Listener
from ..net.loop import Loop
from . import resource
from .head import Request
from .incoming import Incoming
from .link import Link
from .wire import SECRET_BYTES, Asked, parse_target

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
EMPTY = {"Content-Length": "0"}
UNCHANGED = {"Cache-Control": "no-store, no-transform"}
METHODS = ("GET", "HEAD", "DELETE")

_WAIT = re.compile(r"(?:^|,)\s*wait=(\d{1,4})\s*(?:,|;|$)", re.A)


class Server:
    """Everything that receivers fetch from. Links are put in and taken out by the transport, by the receiver's token.

    :param longest_wait: seconds a poll may wait.

    All but the constructor is for the loop's thread."""

    def __init__(self, sock: socket.socket, loop: Loop, longest_wait: float) -> None:
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.links: dict[str, Link] = {}
        self._longest_wait = longest_wait
        self._parked: dict[str, tuple[Incoming, int]] = {}
        self._stopped = False
        self.listener = Listener(
            sock,
            loop,
            "a receiver",
            MAX_CONNECTIONS,
            lambda sock, peer: Incoming(sock, peer, loop, self._answer, self._ended),
        )
        self.listener.start()

    def publish(self, token: str) -> None:
        """Answers the poll of a receiver for which there is something now."""
        parked = self._parked.get(token)
        if parked is not None:
            self._polled(parked[0], Asked(token, None, parked[1], 0, ""), 0.0)

    def waiting(self, token: str) -> bool:
        return token in self._parked

    def stop(self) -> None:
        """Tells those who wait, ends every connection and the listening."""
        self._stopped = True
        self.listener.stop()
        for connection, _ in list(self._parked.values()):
            connection.send(410, EMPTY)
        for connection in list(self.listener.connections):
            connection.end("the sender is closed")

    def _ended(self, connection: Incoming) -> None:
        self.listener.connections.discard(connection)
        self._unpark(connection)

    def _answer(self, connection: Incoming, request: Request) -> None:
        asked = parse_target(request.target)
        shown = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(shown, b"Bearer " + self.secret.hex().encode()):
            log.warning("refused a request without the secret of this sender's address")
            connection.send(403, EMPTY)
        elif asked is None:
            connection.send(404, EMPTY)
        else:
            link = self.links.get(asked.token)
            if link is not None:
                link.heard(asked.landed)
            if asked.number is not None:
                self._write_asked(connection, request, asked.number, asked.outcome, link)
            elif request.method == "GET":
                self._polled(connection, asked, min(_wait_of(request), self._longest_wait))
            elif request.method == "DELETE":
                if link is not None:
                    link.end(TransportError("the receiver is closed"), lost=True)
                connection.send(204, {})
            else:
                connection.send(405, {"Allow": "GET, DELETE", **EMPTY})

    def _write_asked(
        self, connection: Incoming, request: Request, number: int, outcome: str, link: Link | None
    ) -> None:
        found = None if link is None else link.find(number)
        if link is None or found is None:
            connection.send(404, EMPTY)
            return
        of = resource.Representation(found.entry.length, found.entry.etag, found.entry.length, None, METHODS, UNCHANGED)
        answer = resource.answer(request.method, request.headers, of)
        if answer.status == 204:
            link.finish(number, outcome)
        connection.send(
            answer.status, answer.headers, Cursor(found.views, answer.start, answer.stop), source=(link, found)
        )

    # Polls

    def _polled(self, connection: Incoming, asked: Asked, wait: float) -> None:
        """Answered at once, or when there is something or ``wait`` seconds are over. A receiver whose link is not there
        yet, or no more, waits like any other."""
        link = self.links.get(asked.token)
        body = b"" if link is None else link.since(asked.after)
        if body:
            self._unpark(connection)
            headers = {"Content-Type": "application/msgpack", "Content-Length": str(len(body)), **UNCHANGED}
            connection.send(200, headers, Cursor([memoryview(body)]))
        elif self._stopped:
            connection.send(410, EMPTY)
        elif wait:
            before = self._parked.pop(asked.token, None)
            self._parked[asked.token] = (connection, asked.after)
            connection.park(wait, lambda: self._nothing(connection))
            if before is not None:  # it has lost that connection and we have not noticed
                before[0].send(204, UNCHANGED)

    def _nothing(self, connection: Incoming) -> None:
        token = self._unpark(connection)
        if token in self.links:
            self.links[token].heard()
        connection.send(204, UNCHANGED)

    def _unpark(self, connection: Incoming) -> str:
        for token, (parked, _) in self._parked.items():
            if parked is connection:
                del self._parked[token]
                if token in self.links:
                    self.links[token].heard()
                return token
        return ""


def _wait_of(request: Request) -> float:
    """``Prefer: wait=SECONDS``, at least 1; without it, as long as is allowed."""
    found = _WAIT.search(request.headers.get("prefer", ""))
    return math.inf if found is None else max(float(found[1]), 1.0)
