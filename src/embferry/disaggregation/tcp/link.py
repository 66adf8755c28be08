"""The sending side of one connection: writes leave straight from the source memory, answers come back."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable

from ..base.conn_multimodal import LinkLost, Written
from ..base.loop import READ, WRITE, Loop
from ..base.outbox import Outbox
from ..protocol.errors import TransportError
from . import framing
from .framing import Cursor, FrameError

log = logging.getLogger(__name__)

TURN_BYTES = 32 << 20  # sent to one receiver before the others get their turn
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),  # ms without an acknowledgement of sent bytes (RFC 5482)
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


class Link:
    """A connection to the receiver behind ``handle``. All but the constructor and ``write`` is for the loop's thread.

    :param forget: called once when the link is over, before :class:`LinkLost` is posted.
    :raises OSError: the connection is refused at once.
    """

    def __init__(
        self,
        handle: bytes,
        address: tuple[str, int],
        token: bytes,
        timeout_s: float,
        loop: Loop,
        outbox: Outbox,
        forget: Callable[[bytes, Link], None],
    ) -> None:
        self._handle, self._loop, self._outbox, self._forget = handle, loop, outbox, forget
        self._timeout_s = timeout_s
        self._connected = False
        # A write is in flight from the moment it was asked for, so that its end is reported before the link's.
        self._lock = threading.Lock()
        self._error: TransportError | None = None
        self._unanswered: dict[int, None] = {}
        self._outgoing: deque[Cursor] = deque([Cursor([memoryview(framing.hello(token))])])
        self._answer = bytearray()
        self._sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._sock.setblocking(False)
            for option in KEEPALIVE:
                self._sock.setsockopt(*option)
            self._sock.connect(address)
        except BlockingIOError:
            pass
        except OSError:
            self._sock.close()
            raise
        loop.call(self._start)

    def write(self, ticket: int, head: bytes, views: list[memoryview]) -> None:
        """From any thread."""
        with self._lock:
            error = self._error
            if error is None:
                self._unanswered[ticket] = None
        if error is not None:
            self._outbox.post(Written(ticket, error))
        else:
            self._loop.call(lambda: self._send(Cursor([memoryview(head), *views])))

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends every write in flight, and the connection. ``lost``: it was not this side that wanted it."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._outgoing.clear()
        self._forget(self._handle, self)
        for ticket in self._unanswered:
            self._outbox.post(Written(ticket, error))
        if lost:
            log.info("lost the connection to a receiver: %s", error)
            self._outbox.post(LinkLost(self._handle, error))

    def _send(self, frame: Cursor) -> None:
        if self._error is None:
            self._outgoing.append(frame)
            if self._connected:
                self._turn(WRITE)

    def _start(self) -> None:
        self._loop.watch(self._sock.fileno(), WRITE, self._on_connected)
        self._loop.later(self._timeout_s, self._check_connected)

    def _check_connected(self) -> None:
        if not self._connected:
            self.end(TransportError(f"the receiver did not answer within {self._timeout_s} s"), lost=True)

    def _on_connected(self, _: int) -> None:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.end(TransportError(f"cannot connect to the receiver: {os.strerror(code)}"), lost=True)
            return
        self._connected = True
        self._turn(WRITE)

    def _turn(self, events: int) -> None:
        try:
            if events & WRITE:
                self._flush()
            if events & READ:
                self._read_answers()
        except (OSError, FrameError) as error:
            self.end(TransportError(f"the connection to the receiver broke: {error}"), lost=True)
            return
        if self._error is None:
            self._loop.watch(self._sock.fileno(), READ | WRITE if self._outgoing else READ, self._turn)

    def _flush(self) -> None:
        budget = TURN_BYTES
        while self._outgoing and budget > 0:
            cursor = self._outgoing[0]
            try:
                sent = self._sock.sendmsg(cursor.views())
            except BlockingIOError:
                return
            cursor.advance(sent)
            budget -= sent
            if cursor.done:
                self._outgoing.popleft()

    def _read_answers(self) -> None:
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise FrameError("the receiver closed it")
        self._answer += data
        size = framing.ANSWER.size
        whole = len(self._answer) // size * size
        for at in range(0, whole, size):
            self._on_answer(*framing.parse_answer(self._answer[at : at + size]))
        del self._answer[:whole]

    def _on_answer(self, ticket: int, verdict: int) -> None:
        if ticket not in self._unanswered:
            raise FrameError(f"an answer to the write {ticket}, which is not in flight")
        del self._unanswered[ticket]
        error = None
        if verdict == framing.REFUSED:
            error = TransportError("the receiver has no open window that covers the write", retryable=False)
        self._outbox.post(Written(ticket, error))
