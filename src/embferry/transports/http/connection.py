"""A connection of either end: receives heads, sends messages. :class:`ClientConnection` is that of a receiver."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from embferry.protocol.errors import TransportError
from embferry.trust.digests import CONTENT_DIGEST
from embferry.trust.requests import MAX_CHALLENGES, PROOF_HEADER, ProvedRequest, Prover, read_challenge

from ..net.connector import connecting
from ..net.cursor import Cursor
from ..net.deadlines import Timeout
from ..net.loop import READ, WRITE, Scope
from ..net.stream import Stream, dialled, unwatch, watch
from . import heads
from .heads import HttpError, Response
from .messages import PATH, Destination

PEEK_BYTES = 4096
DROP_BYTES = 64 << 10
TURN_BYTES = 32 << 20  # sent on one connection before others get their turn
MAX_ERROR_BODY_BYTES = 64 << 10
BODILESS = (204, 304)


class Connection(ABC):
    """Sends one message at a time and receives heads. For the loop's thread.

    Its callbacks run in the scope that it is given.

    What follows a head stays in the kernel, so that a body can be received where it belongs.
    """

    def __init__(self, loop: Scope) -> None:
        self._loop = loop
        self._sock: Stream | None = None
        self._timeout = Timeout(loop, self._on_timeout)
        self._head = bytearray()  # the received part of one
        self._unsent = Cursor([])

    @abstractmethod
    def _on_timeout(self) -> None: ...

    @abstractmethod
    def _on_error(self, error: HttpError | OSError) -> None:
        """The peer has violated the protocol, or the connection has broken."""

    @abstractmethod
    def _receive(self, sock: Stream) -> None:
        """Receives from a readable socket. Its exceptions go to :meth:`_on_error`."""

    def _on_bytes_sent(self, sock: Stream, left: int) -> None:  # noqa: B027  (a request is small)
        """Part of the message has been sent; ``left`` bytes are left."""

    def _send(self, head: bytes, body: Cursor | None = None) -> None:
        self._unsent = body or Cursor([])
        self._unsent.prepend(memoryview(head))
        self._watch(WRITE)

    def _watch(self, events: int) -> None:
        if self._sock is not None:
            watch(self._loop, self._sock, events, self._turn)

    def _turn(self, events: int) -> None:
        if self._sock is None:
            return
        try:
            if events & WRITE and self._unsent.left:
                self._flush(self._sock)
            elif events & READ:
                self._receive(self._sock)
        except BlockingIOError:
            return
        except (HttpError, OSError) as error:
            self._on_error(error)

    def _flush(self, sock: Stream) -> None:
        budget = TURN_BYTES
        while self._unsent.left and budget > 0:
            sent = sock.sendmsg(self._unsent.views())
            self._unsent.advance(sent)
            budget -= sent
            self._on_bytes_sent(sock, self._unsent.left)
        if not self._unsent.left:
            self._unsent.release()
            self._watch(READ)

    def _receive_head(self, sock: Stream) -> bytes | None:
        """Returns the next head, None while it is incomplete."""
        peeked = sock.recv(PEEK_BYTES, socket.MSG_PEEK)
        if not peeked:
            raise ConnectionError("the peer has closed it")
        before = len(self._head)
        self._head += peeked
        length = heads.head_length(self._head)
        sock.recv(len(peeked) if length < 0 else length + len(heads.END) - before)
        if length < 0:
            return None
        head = bytes(self._head[:length])
        self._head.clear()
        return head

    def _close(self) -> None:
        self._timeout.clear()
        self._head.clear()
        self._unsent.release()
        if self._sock is not None:
            unwatch(self._loop, self._sock)
            self._sock.close()
            self._sock = None


class ResponseHandler:
    """Processes the response to one request. Called on the loop's thread; must not block.

    ``on_head`` and ``receive`` may raise HttpError: the request then fails, like one whose connection breaks.
    """

    def on_head(self, response: Response, length: int) -> None:
        """The head has arrived; ``length`` bytes follow."""

    def receive(self, sock: Stream, left: int) -> int:
        """Receives up to ``left`` bytes of the body without blocking; returns how many. By default drops them."""
        return len(sock.recv(min(left, DROP_BYTES)))

    def on_end(self) -> None:
        """The response is complete."""

    def on_failure(self, reason: str) -> None:
        """There is no complete response, and the connection has been closed."""


class _Call(NamedTuple):
    """The arguments of :meth:`ClientConnection.request`."""

    method: str
    path: str
    headers: Mapping[str, str]
    handler: ResponseHandler
    wait_s: float


class ClientConnection(Connection):
    """A connection to a sender or its proxy, made for the first request and for each that finds it closed.

    Args:
        prover: Proves the cluster key to the sender; None without one.
        timeout_s: A request fails after this time without a byte of its response.
    """

    def __init__(self, to: Destination, loop: Scope, prover: Prover | None, timeout_s: float) -> None:
        super().__init__(loop)
        self._to, self._prover = to, prover
        self._timeout_s, self._head_timeout_s = timeout_s, timeout_s
        self._proved: ProvedRequest | None = None
        self._call: _Call | None = None  # under way, to be sent again with another proof
        self._challenges = 0
        self._is_challenged = False
        self._handler: ResponseHandler | None = None
        self._left = -1  # bytes of the body still to come; -1: the head is not complete
        self._closes = False

    def request(
        self, method: str, path: str, headers: Mapping[str, str], handler: ResponseHandler, wait_s: float = 0.0
    ) -> None:
        """Sends a request. The head of its response may take ``wait_s`` longer than the time-out."""
        self._challenges = 0
        self._request(_Call(method, path, headers, handler, wait_s))

    def _request(self, call: _Call) -> None:
        self._call, (method, path, headers, handler, wait_s) = call, call
        self._proved = None if self._prover is None else self._prover.prove(method, PATH + path)
        credentials = f"Bearer {self._to.secret}" if self._proved is None else self._proved.authorization
        fields = {"Host": self._to.authority, "Authorization": credentials, **headers}
        self._handler, self._left, self._is_challenged = handler, -1, False
        self._head_timeout_s = wait_s + self._timeout_s
        self._timeout.set(self._head_timeout_s)
        try:
            if self._sock is None:
                self._sock = self._connecting()
            self._send(heads.write_request(method, self._to.prefix + path, fields))
        except (TransportError, OSError) as error:
            # Later, because the caller of this method has not returned.
            self._loop.call(partial(self._fail, str(error), handler))

    def _connecting(self) -> Stream:
        sock = connecting((self._to.host, self._to.port))
        try:
            return dialled(sock, self._to.tls, self._to.host)
        except BaseException:
            sock.close()
            raise

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way."""
        return self._handler is not None

    def close(self) -> None:
        """Closes the connection; the handler of a request under way is not called any more."""
        self._handler = self._call = None
        self._close()

    def _fail(self, reason: str, handler: ResponseHandler | None) -> None:
        if self._handler is handler:
            self.close()
            if handler is not None:
                handler.on_failure(reason)

    def _on_timeout(self) -> None:
        self._fail(f"no response for {self._head_timeout_s:g} s", self._handler)

    def _on_error(self, error: HttpError | OSError) -> None:
        self._fail(str(error), self._handler)

    def _receive(self, sock: Stream) -> None:
        handler = self._handler
        if handler is None:
            self.close()  # the peer has closed it, or sent something without a request
            return
        if self._left < 0:
            self._take_head(sock, handler)
            self._timeout.set(self._head_timeout_s if self._left < 0 else self._timeout_s)
        if self._left > 0:
            receive = ResponseHandler.receive if self._is_challenged else type(handler).receive
            received = receive(handler, sock, self._left)
            if not received:
                raise HttpError("the peer closed the connection before the end of its response")
            self._left -= received
            self._timeout.set(self._timeout_s)
        if self._left == 0:
            call, self._handler, self._call = self._call, None, None
            self._timeout.clear()
            if self._closes or not _is_silent(sock):
                self.close()
            if self._is_challenged and call is not None:
                self._request(call)
            else:
                handler.on_end()

    def _take_head(self, sock: Stream, handler: ResponseHandler) -> None:
        head = self._receive_head(sock)
        if head is None:
            return
        response = heads.parse_response(head)
        if response.status < 200:
            return  # RFC 9110 §15.2: another head follows
        body = 0 if response.status in BODILESS else heads.content_length(response.headers)
        if body is None or (response.status >= 300 and body > MAX_ERROR_BODY_BYTES):
            raise HttpError(f"a response with status {response.status} and a body of unknown or excessive length")
        self._closes, self._left = response.closes, body
        self._check_proof(response)
        if not self._is_challenged:
            handler.on_head(response, body)

    def _check_proof(self, response: Response) -> None:
        """Notes a challenge; raises HttpError unless the response is one or is proved, if there is a cluster key."""
        challenge = response.headers.get("www-authenticate")
        if self._proved is None or self._prover is None:
            if read_challenge(challenge) is not None:
                raise HttpError("the sender asks for a cluster key, and this end has none")
        elif response.status == 401 and (reason := self._prover.on_challenge(challenge)) is not None:
            self._challenges += 1
            if reason == "wrong_key" or self._challenges > MAX_CHALLENGES:
                raise HttpError("the sender does not accept this end's cluster key; give both the same key file")
            self._is_challenged = True
        else:
            digest, proof = (response.headers.get(name.lower()) for name in (CONTENT_DIGEST, PROOF_HEADER))
            if not self._proved.is_answered_by(response.status, digest, proof):
                raise HttpError(f"a response with status {response.status} has no proof of the cluster key")


def _is_silent(sock: Stream) -> bool:
    """Returns whether nothing more has arrived: after further bytes a connection must not be used (RFC 9112 §6.3)."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
