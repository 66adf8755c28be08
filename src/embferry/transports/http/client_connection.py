"""Connections of a receiver to a sender or its proxy: one request at a time, kept open for the next."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import partial

from embferry.protocol.errors import TransportError

from ..net.connector import connecting
from ..net.loop import READ, WRITE, Scope, Timeout
from . import heads
from .heads import HttpError, Response
from .messages import Destination

MAX_ERROR_BODY_BYTES = 64 << 10
RECEIVE_BYTES = 64 << 10
BODILESS = (204, 304)


class ResponseHandler:
    """Processes the response to one request. Called on the loop's thread; must not block.

    ``on_head`` and ``receive`` may raise HttpError: the request then fails, like one whose connection breaks.
    """

    def on_head(self, response: Response, length: int) -> None:
        """The head has arrived; ``length`` bytes follow."""

    def receive(self, sock: socket.socket, left: int) -> int:
        """Receives up to ``left`` bytes of the body without blocking; returns how many. By default drops them."""
        return len(sock.recv(min(left, RECEIVE_BYTES)))

    def on_end(self) -> None:
        """The response is complete."""

    def on_failure(self, reason: str) -> None:
        """There is no complete response, and the connection has been closed."""


class ClientConnection:
    """Connects for the first request, and for each request after the connection was closed. For the loop's thread.

    Args:
        timeout_s: A request fails after this time without a byte of its response.
    """

    def __init__(self, to: Destination, loop: Scope, timeout_s: float) -> None:
        self._to, self._loop, self._timeout_s = to, loop, timeout_s
        self._timeout = Timeout(loop, lambda: self._fail(f"no response for {self._head_timeout_s:g} s"))
        self._head_timeout_s = timeout_s
        self._handler: ResponseHandler | None = None
        self._unsent = b""
        self._head = bytearray()
        self._left = -1  # bytes of the body still to come; -1: the head is not complete
        self._closes = False
        self._sock: socket.socket | None = None

    def request(
        self, method: str, path: str, headers: Mapping[str, str], handler: ResponseHandler, wait_s: float = 0.0
    ) -> None:
        """Sends a request. The head of its response may take ``wait_s`` longer than the time-out."""
        fields = {"Host": self._to.authority, "Authorization": f"Bearer {self._to.secret}", **headers}
        self._unsent = heads.write_request(method, self._to.prefix + path, fields)
        self._handler, self._left = handler, -1
        self._head.clear()
        self._head_timeout_s = wait_s + self._timeout_s
        self._timeout.set(self._head_timeout_s)
        try:
            if self._sock is None:
                self._sock = connecting((self._to.host, self._to.port))
            self._loop.watch(self._sock.fileno(), WRITE, self._on_ready)
        except (TransportError, OSError) as error:
            # Later, because the caller of this method has not returned.
            self._loop.call(partial(self._fail_request, handler, str(error)))

    def close(self) -> None:
        """Closes the connection; the handler of a request under way is not called any more."""
        self._timeout.clear()
        self._handler = None
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _fail_request(self, handler: ResponseHandler, reason: str) -> None:
        if self._handler is handler:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        handler = self._handler
        self.close()
        if handler is not None:
            handler.on_failure(reason)

    def _on_ready(self, events: int) -> None:
        if self._sock is None:
            return
        try:
            if events & WRITE:
                self._send(self._sock)
            elif self._handler is None:
                self.close()  # the peer has closed it, or sent something without a request
            else:
                self._receive(self._sock, self._handler)
        except BlockingIOError:
            return
        except HttpError as error:
            self._fail(str(error))
        except OSError as error:
            self._fail(f"the connection broke: {error}")

    def _send(self, sock: socket.socket) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self._unsent = self._unsent[sock.send(self._unsent) :]
        if not self._unsent:
            self._loop.watch(sock.fileno(), READ, self._on_ready)

    def _receive(self, sock: socket.socket, handler: ResponseHandler) -> None:
        if self._left < 0:
            self._receive_head(sock, handler)
            self._timeout.set(self._head_timeout_s if self._left < 0 else self._timeout_s)
        if self._left > 0:
            received = handler.receive(sock, self._left)
            if not received:
                raise HttpError("the peer closed the connection before the end of its response")
            self._left -= received
            self._timeout.set(self._timeout_s)
        if self._left == 0:
            self._finish(handler)

    def _receive_head(self, sock: socket.socket, handler: ResponseHandler) -> None:
        # The body stays in the kernel, so that it can be received where it belongs.
        peeked = sock.recv(4096, socket.MSG_PEEK)
        if not peeked:
            raise HttpError("the peer closed the connection before the end of its response")
        before = len(self._head)
        self._head += peeked
        length = heads.head_length(self._head)
        sock.recv(len(peeked) if length < 0 else length + len(heads.END) - before)
        if length < 0:
            return
        response = heads.parse_response(bytes(self._head[:length]))
        self._head.clear()
        if response.status < 200:
            return  # RFC 9110 §15.2: another head follows
        body = 0 if response.status in BODILESS else heads.content_length(response.headers)
        if body is None or (response.status >= 300 and body > MAX_ERROR_BODY_BYTES):
            raise HttpError(f"a response with status {response.status} and a body of unknown or excessive length")
        # A connection with more bytes than the response must not be used again: RFC 9112 §6.3.
        surplus = before + len(peeked) - (length + len(heads.END)) - body
        self._closes, self._left = response.closes or surplus > 0, body
        handler.on_head(response, body)

    def _finish(self, handler: ResponseHandler) -> None:
        self._handler = None
        self._timeout.clear()
        if self._closes:
            self.close()
        handler.on_end()
