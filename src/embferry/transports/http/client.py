"""One connection of a receiver: one exchange at a time, kept for the next."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

from embferry.protocol.errors import TransportError

from ..net.connector import connecting
from ..net.loop import READ, WRITE, Loop
from . import head
from .deadline import Deadline
from .head import HttpError
from .wire import Destination

MAX_REMARK_BYTES = 64 << 10  # what an answer that is an error may say beside its status
BODILESS = (204, 304)


class Exchange(ABC):
    """What is asked, and what becomes of the answer. Called on the loop's thread; any of it may raise HttpError."""

    @abstractmethod
    def begun(self, status: int, headers: Mapping[str, str], length: int) -> None:
        """The head of the answer is there; ``length`` bytes follow."""

    @abstractmethod
    def take(self, data: memoryview) -> None:
        """The first bytes of the body, which came together with the head."""

    @abstractmethod
    def receive(self, sock: socket.socket, left: int) -> int:
        """Receives at most ``left`` bytes of the body without waiting; returns how many."""

    @abstractmethod
    def done(self, connection: Connection | None) -> None:
        """The body is complete. The connection can be used again, unless None."""

    @abstractmethod
    def broken(self, reason: str) -> None:
        """The exchange did not come to its end."""


class Connection:
    """:param dropped: called when the connection ends while it is not in an exchange."""

    def __init__(self, to: Destination, loop: Loop, patience_s: float, dropped: Callable[[Connection], None]) -> None:
        self._to, self._loop, self._patience_s, self._dropped = to, loop, patience_s, dropped
        self._deadline = Deadline(loop, lambda: self._break(f"no answer for {self._allowed:g} s"))
        self._allowed = patience_s
        self._exchange: Exchange | None = None
        self._out = b""
        self._in = bytearray()
        self._left = -1  # bytes of the body still to come; -1: the head is not complete
        self._closes = False
        self._sock: socket.socket | None = None

    def ask(self, method: str, path: str, headers: Mapping[str, str], exchange: Exchange, wait: float = 0.0) -> None:
        """Begins an exchange; ``wait``: seconds the answer may take beyond the patience for everything."""
        fields = {"Host": self._to.authority, "Authorization": f"Bearer {self._to.secret}", **headers}
        self._out = head.request(method, self._to.prefix + path, fields)
        self._exchange, self._left = exchange, -1
        self._allowed = wait + self._patience_s
        self._deadline.set(self._allowed)
        try:
            if self._sock is None:
                self._sock = connecting((self._to.host, self._to.port))
            self._loop.watch(self._sock.fileno(), WRITE, self._ready)
        except (TransportError, OSError) as error:
            # Not from within the call: who asks has not finished yet.
            self._loop.call(partial(self._break, str(error)))

    def end(self) -> None:
        """Closes it; an exchange under way hears no more."""
        self._deadline.clear()
        self._exchange = None
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _break(self, reason: str) -> None:
        exchange = self._exchange
        self.end()
        if exchange is not None:
            exchange.broken(reason)

    def _ready(self, events: int) -> None:
        if self._sock is None:
            return
        try:
            if events & WRITE:
                self._send(self._sock)
            elif self._exchange is None:
                self.end()  # the peer has ended it, or said what nobody asked for
                self._dropped(self)
            else:
                self._receive(self._sock, self._exchange)
        except BlockingIOError:
            return
        except HttpError as error:
            self._break(str(error))
        except OSError as error:
            self._break(f"the connection broke: {error}")

    def _send(self, sock: socket.socket) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self._out = self._out[sock.send(self._out) :]
        if not self._out:
            self._loop.watch(sock.fileno(), READ, self._ready)

    def _receive(self, sock: socket.socket, exchange: Exchange) -> None:
        if self._left < 0:
            data = sock.recv(4096)
            received = len(data)
            self._in += data
            self._take_head(exchange)
        else:
            received = exchange.receive(sock, self._left)
            self._left -= received
        if not received:
            raise HttpError("the peer closed the connection before the end of its answer")
        if self._left == 0:
            self._finish(exchange)
        else:
            self._deadline.set(self._allowed if self._left < 0 else self._patience_s)

    def _take_head(self, exchange: Exchange) -> None:
        while self._left < 0:
            end = self._in.find(head.END)
            if (end if end >= 0 else len(self._in)) > head.MAX_HEAD_BYTES:
                raise HttpError(f"an answer with a head of more than {head.MAX_HEAD_BYTES} bytes")
            if end < 0:
                return
            response = head.parse_response(bytes(self._in[:end]))
            del self._in[: end + len(head.END)]
            if 100 <= response.status < 200:
                continue  # RFC 9110 §15.2: more follows
            length = 0 if response.status in BODILESS else head.content_length(response.headers)
            if length is None or (response.status >= 300 and length > MAX_REMARK_BYTES):
                raise HttpError(f"an answer with status {response.status} and a body of unknown or absurd length")
            if len(self._in) > length:
                raise HttpError("more bytes than the answer's Content-Length")
            self._closes, self._left = response.closes, length
            exchange.begun(response.status, response.headers, length)
            if self._in:
                exchange.take(memoryview(bytes(self._in)))
                self._left -= len(self._in)
                self._in.clear()

    def _finish(self, exchange: Exchange) -> None:
        self._exchange = None
        self._deadline.clear()
        if self._closes:
            self.end()
            exchange.done(None)
        else:
            exchange.done(self)
