"""A small HTTP server on one thread: one request a connection, and bounds on everything that clients can hold.

A connection exists until a fixed time after it was accepted: a client that sends a byte now and then gains nothing. A
full server makes room instead of refusing: the connection that was accepted first is closed. A client with an honest
request needs its connection for milliseconds, so the oldest ones belong to clients that are slow or mean harm.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

import h11
import msgspec

from embferry.transports.net.address import network_of
from embferry.transports.net.deadlines import Deadlines
from embferry.transports.net.listener import Listener, ListenLimits
from embferry.transports.net.loop import READ, WRITE, LoopThread
from embferry.transports.net.stream import Stream, watch
from embferry.transports.net.tls_socket import TlsError
from embferry.trust.ambiguity import ambiguity_of
from embferry.trust.chunks import BoundedChunks
from embferry.trust.digests import CONTENT_DIGEST, DamagedError, check_content, check_foreign_content, content_digest
from embferry.trust.rates import NetworkRates
from embferry.trust.refusals import Refusals
from embferry.trust.requests import PROOF_HEADER, Accepted
from embferry.trust.tls import Tls

from .server_limits import ServerLimits

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 64
MAX_BODY_BYTES = 64 << 10
MAX_UNSENT_BYTES = 32 << 20  # of responses that their clients do not read, together
RECEIVE_BYTES = 16 << 10
BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. ``content`` is encoded as JSON, unless it is a text."""

    content: object
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """A request before its body.

    Attributes:
        headers: By name in lower case; the last of several with the same name.
        address: The client's IP address.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    address: str


class RequestError(Exception):
    """The reason why a request gets an error response."""

    def __init__(
        self,
        code: str,
        message: str,
        status: int = HTTPStatus.BAD_REQUEST,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.status, self.headers = code, status, headers or {}


Handler = Callable[[str, str, bytes], Answer]
Guard = Callable[[Head], Accepted | None]
"""Returns the proof of a request, or None if it may go on without one; raises :class:`RequestError`. Called on the
server's thread, before the body is received; must not block."""


class HttpServer:
    """Accepts connections and answers one request on each.

    Args:
        sock: Listens already; closed by the server.
        handler: Returns the answer to a method, a target and a body, or raises :class:`RequestError`. Called on the
            server's thread, without locks; must not block.
        limits: Bounds on what clients can hold.
        thread_name: Name of the server's thread.
        guard: Says which requests may go on.
        tls: The certificate, with which clients must have one of the same CA. None: connections are not encrypted.
        is_exempt: Returns whether an address may send any number of requests a second without a proof.

    Attributes:
        rates: The limits of requests without a proof.
        evicted: Connections that had to make room for others.
        timed_out: Connections that were closed because their time was over.

    Raises:
        OSError: No descriptors are left.
    """

    def __init__(
        self,
        sock: socket.socket,
        handler: Handler,
        limits: ServerLimits,
        thread_name: str,
        guard: Guard = lambda head: None,
        tls: Tls | None = None,
        is_exempt: Callable[[str], bool] = lambda address: False,
    ) -> None:
        self.rates = NetworkRates(limits.unproved_requests_per_second, limits.unproved_bytes_per_second, is_exempt)
        self.evicted = self.timed_out = 0
        self.unsent_bytes = 0
        self.handler, self.guard, self.tls = handler, guard, tls
        self.refusals = Refusals(thread_name)
        self._sock, self._limits = sock, limits
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = limits.connections if files < 0 else min(limits.connections, max(1, files // 2))
        self._thread = LoopThread(thread_name, lambda error: None)
        self.loop = self._thread.loop
        self._open: dict[_Exchange, None] = {}  # the oldest first
        self._networks: dict[str, dict[_Exchange, None]] = {}
        self._deadlines = Deadlines[_Exchange](self.loop, limits.request_timeout, self._on_timeout)
        self._listener: Listener[_Exchange] | None = None
        self._stopped = False
        self._thread.call(self._listen)

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._open)

    def stop(self) -> None:
        """Closes every connection and ends the thread. Idempotent. Any thread but the server's."""
        self._thread.call(self._stop)
        self._thread.close()

    def _listen(self) -> None:
        if not self._stopped:
            # a connection never introduces itself, so the server bounds all of them; its time limit is the request's
            each, seconds = self._limits.connections_per_address, 2 * self._limits.request_timeout
            limits = ListenLimits(handshakes=self._most, handshakes_per_address=each, hello_timeout=seconds)
            self._listener = Listener(self._sock, self.loop, "a client", limits, self._on_accept, tls=self.tls)
            self._listener.start()

    def _stop(self) -> None:
        self._stopped = True
        if self._listener is not None:
            self._listener.stop()
        self._sock.close()
        for exchange in list(self._open):
            exchange.end()

    def _on_accept(self, sock: Stream, peer: tuple[str, int]) -> _Exchange:
        exchange = _Exchange(sock, peer[0], self)
        siblings = self._networks.setdefault(exchange.network, {})
        if len(siblings) >= self._limits.connections_per_address:
            self.evict(next(iter(siblings)))
        elif len(self._open) >= self._most:
            self.evict(next(iter(self._open)))
        self._open[exchange] = None
        self._networks.setdefault(exchange.network, {})[exchange] = None
        self._deadlines.start(exchange)
        self.loop.call(exchange.start)  # once the listener knows the connection
        return exchange

    def forget(self, exchange: _Exchange) -> None:
        """Removes a connection that has been closed."""
        self._deadlines.stop(exchange)
        if self._listener is not None:
            self._listener.ended(exchange)
        if exchange in self._open:
            del self._open[exchange]
            siblings = self._networks[exchange.network]
            del siblings[exchange]
            if not siblings:
                del self._networks[exchange.network]

    def count_unsent(self, count: int) -> None:
        """Accounts for response bytes, and closes the oldest connections that hold some while there are too many."""
        self.unsent_bytes += count
        while self.unsent_bytes > MAX_UNSENT_BYTES:
            self.evict(next(exchange for exchange in self._open if exchange.unsent))

    def evict(self, exchange: _Exchange) -> None:
        """Closes a connection for the sake of others."""
        exchange.receive_now()
        if exchange not in self._open:
            return  # its request was there, and has its response
        self.evicted += 1
        message = "this connection made room for another; send the request again, at once and whole"
        exchange.close_with(Answer(_error("too_many_connections", message), 503, {"Retry-After": "1"}))

    def _on_timeout(self, exchange: _Exchange) -> None:
        self.timed_out += 1
        message = f"the request did not end within {self._limits.request_timeout:g} s"
        exchange.close_with(Answer(_error("request_timeout", message), 408))


class _Exchange:
    """One request and its response, on one connection. An exception of its callbacks ends this connection only.

    Attributes:
        network: The address whose connections are counted together.
        unsent: The part of the response that the kernel has not taken.
    """

    def __init__(self, sock: Stream, address: str, server: HttpServer) -> None:
        self.network = network_of(address)
        self.unsent = memoryview(b"")
        self._sock, self._address, self._server = sock, address, server
        self._scope = server.loop.scope(self._on_failure)
        self._http = BoundedChunks(h11.SERVER, MAX_HEAD_BYTES)
        self._request: Head | None = None
        self._proved: Accepted | None = None
        self._body = bytearray()
        self._complete = self._answered = self._ended = False
        sock.setblocking(False)

    def start(self) -> None:
        """Begins to receive. The request may be there already, because the kernel accepts before the server does."""
        watch(self._scope, self._sock, READ, self._on_ready)
        self.receive_now()

    def make_room(self, reason: str) -> bool:
        """Closes the connection for the sake of others."""
        self._server.evict(self)
        return True

    def receive_now(self) -> None:
        """Takes what has arrived, if the request is not complete: a busy server may not have come to it yet."""
        if not self._answered:
            self._scope.run(self._on_ready, READ)

    def end(self) -> None:
        """Closes the connection. Idempotent."""
        if not self._ended:
            self._ended = True
            self._scope.end()
            self._sock.close()
            self._server.forget(self)
            left, self.unsent = len(self.unsent), memoryview(b"")
            self._server.count_unsent(-left)

    def close_with(self, answer: Answer) -> None:
        """Closes the connection now, with ``answer`` if no other has begun."""
        if not (self._answered or self._ended):
            with contextlib.suppress(OSError, h11.ProtocolError):
                self._sock.send(self._encode(answer))
        self.end()

    def _on_failure(self, error: BaseException) -> None:
        message = "the request failed; the traceback is in the server's log"
        self.close_with(Answer(_error("internal_error", message), HTTPStatus.INTERNAL_SERVER_ERROR))

    def _on_ready(self, events: int) -> None:
        try:
            if events & WRITE and self.unsent:
                self._push()
            elif events & READ:
                self._receive()
        except BlockingIOError:
            return
        except TlsError as error:
            self._server.refusals.report(self._address, str(error))
            self.end()
        except OSError as error:  # the client has left
            log.debug("the connection of %s broke: %s", self.network, error)
            self.end()

    def _receive(self) -> None:
        received = self._sock.recv(RECEIVE_BYTES)
        if not received:
            self.end()
        elif not self._answered:  # the rest of a request that was refused is dropped
            try:
                self._http.receive_data(received)
                self._take()
            except RequestError as error:
                self._answer(Answer(_error(error.code, str(error)), error.status, error.headers))
            except h11.RemoteProtocolError as error:
                self._answer(Answer(_error("invalid_request", str(error)[:200]), error.error_status_hint))

    def _take(self) -> None:
        while not self._answered:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                _check_head(event)
                self._request = _head(event, self._address)
                self._proved = self._server.guard(self._request)
                if self._proved is None:
                    self._check_rates()
            elif isinstance(event, h11.Data):
                if self._proved is None:
                    self._server.rates.count(self.network, len(event.data))
                self._body += event.data
                _check_length(len(self._body))
            elif isinstance(event, h11.EndOfMessage) and self._request is not None:
                self._complete = True
                body = bytes(self._body)
                self._check_digest(self._request.headers.get(CONTENT_DIGEST.lower()), body)
                self._answer(self._server.handler(self._request.method, self._request.target, body))
            else:
                if self._http.they_are_waiting_for_100_continue:
                    self._sock.send(self._http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                return

    def _check_rates(self) -> None:
        if (excess := self._server.rates.enter(self._address, self.network)) is not None:
            limit, after = f"{excess.limit} without a proof of the cluster key", str(excess.seconds)
            self._server.refusals.report(self._address, f"it sends more than {limit}")
            message = f"this client may send {limit}; try again in {after} s"
            raise RequestError("rate_limited", message, HTTPStatus.TOO_MANY_REQUESTS, {"Retry-After": after})

    def _check_digest(self, digest: str | None, body: bytes) -> None:
        """A proof covers the digest, and the digest the body; without a proof, the client may have sent none."""
        try:
            if self._proved is None and digest is not None:
                check_foreign_content(digest, body)
            elif self._proved is not None and (body or digest is not None):
                check_content(digest, body)
        except DamagedError as error:
            raise RequestError("body_damaged", f"{error}; send the request again") from error

    def _answer(self, answer: Answer) -> None:
        self._answered = True
        self._body.clear()
        self.unsent = memoryview(self._encode(answer))
        self._server.count_unsent(len(self.unsent))
        if not self._ended:
            self._push()

    def _push(self) -> None:
        sent = 0
        with contextlib.suppress(BlockingIOError):
            sent = self._sock.send(self.unsent)
        self.unsent = self.unsent[sent:]
        self._server.count_unsent(-sent)
        if self.unsent:
            watch(self._scope, self._sock, WRITE, self._on_ready)
        elif self._complete:
            self.end()
        else:  # closing with unread bytes would take the answer back, so the client has to close
            self._sock.shutdown(socket.SHUT_WR)
            watch(self._scope, self._sock, READ, self._on_ready)

    def _encode(self, answer: Answer) -> bytes:
        is_text = isinstance(answer.content, str)
        body = answer.content.encode() if isinstance(answer.content, str) else msgspec.json.encode(answer.content)
        headers = {
            "Content-Type": "text/plain; charset=utf-8" if is_text else "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            CONTENT_DIGEST: content_digest(body),
            **answer.headers,
        }
        if self._proved is not None:
            headers[PROOF_HEADER] = self._proved.answer_proof(answer.status, headers[CONTENT_DIGEST])
        reason = HTTPStatus(answer.status).phrase
        response = h11.Response(status_code=answer.status, headers=list(headers.items()), reason=reason)
        head = self._http.send(response) or b""
        return head if self._request is not None and self._request.method == "HEAD" else head + body


def _error(code: str, message: str) -> object:
    return {"error": {"code": code, "message": message}}


def _head(request: h11.Request, address: str) -> Head:
    headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
    return Head(request.method.decode(), request.target.decode(), headers, address)


def _check_head(request: h11.Request) -> None:
    if why := ambiguity_of(name for name, _ in request.headers):
        raise RequestError("invalid_request", why)
    size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
    if size > MAX_HEAD_BYTES or len(request.headers) > MAX_HEADERS:
        limits = f"at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} header fields"
        raise RequestError("too_large", limits, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    for name, value in request.headers:
        if name == b"content-length":
            _check_length(int(value))


def _check_length(length: int) -> None:
    if length > MAX_BODY_BYTES:
        raise RequestError("too_large", f"a body of up to {MAX_BODY_BYTES} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
