"""One connection to a sender: a request, its answer, the next request.

The bytes of a write leave straight from the source memory. A client may send its next request before it has the answer
to the last; it is answered in its turn.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ..net.cursor import Cursor
from ..net.loop import READ, WRITE, Loop
from . import head
from .deadline import Deadline
from .head import HttpError, Request

if TYPE_CHECKING:
    from .link import Link, Published

log = logging.getLogger(__name__)

REQUEST_S = 10.0  # from the first byte of a request, or from the connection, to the end of its head
IDLE_S = 75.0  # between two requests
UNSENT_S = 30.0  # without a byte of an answer taken
TURN_BYTES = 32 << 20  # sent to one receiver before the others get their turn
LINGER_S = 2.0  # for the peer to read the last answer before the connection is closed


class Incoming:
    """:param answer: is given every request; calls :meth:`send` or :meth:`park`.
    :param ended: is called once, when the connection is over."""

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        loop: Loop,
        answer: Callable[[Incoming, Request], None],
        ended: Callable[[Incoming], None],
    ) -> None:
        self._sock, self._address, self._loop, self._answer, self._on_end = sock, address, loop, answer, ended
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._in = bytearray()
        self._out: Cursor | None = None
        self._source: tuple[Link, Published] | None = None
        self._closes = self._lingers = self._ended = False
        self._given_up: Callable[[], None] | None = None  # of a poll that waits: what to do when its time has come
        self._deadline = Deadline(loop, self._expired)
        self._deadline.set(REQUEST_S)
        loop.watch(sock.fileno(), READ, self._ready)

    # The server's side

    def send(
        self,
        status: int,
        headers: Mapping[str, str],
        body: Cursor | None = None,
        source: tuple[Link, Published] | None = None,
    ) -> None:
        """The answer to the request that was handed out last. ``source`` is the write that ``body`` is of."""
        self._given_up = None
        self._closes |= status in (400, 403, 410, 413)
        fields = {**headers, **({"Connection": "close"} if self._closes else {})}
        self._head = Cursor([memoryview(head.response(status, fields))])
        self._out = body or Cursor([])
        if source is not None and self._out.left:
            self._source = source
            source[1].readers.add(self)
        self._deadline.set(UNSENT_S)
        self._loop.watch(self._sock.fileno(), WRITE, self._ready)
        self._guarded(self._flush)

    def park(self, seconds: float, given_up: Callable[[], None]) -> None:
        """The answer follows later; ``given_up`` is called after ``seconds``, unless :meth:`send` was before."""
        self._given_up = given_up
        self._deadline.set(seconds)

    def end(self, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        log.debug("closed the connection of %s: %s", self._address, reason)
        self._deadline.clear()
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._let_go()
        self._on_end(self)

    # The connection's side

    def _let_go(self) -> None:
        if self._out is not None:
            self._out.release()
            self._out = None
        if self._source is not None:
            self._source[1].readers.discard(self)
            self._source = None

    def _ready(self, events: int) -> None:
        if not self._ended:
            self._guarded(self._read if events & READ else self._flush)

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BlockingIOError:
            return
        except HttpError as error:
            log.warning("a request from %s makes no sense: %s", self._address, error)
            self._in.clear()
            self._closes = True
            self.send(400, {"Content-Length": "0"})
        except OSError as error:
            self.end(str(error))

    def _read(self) -> None:
        data = self._sock.recv(head.MAX_HEAD_BYTES)
        if not data:
            self.end("it closed")
        elif not self._lingers:
            self._in += data
            self._take_request()

    def _take_request(self) -> None:
        if self._ended or self._out is not None:
            return
        end = self._in.find(head.END)
        if (end if end >= 0 else len(self._in)) > head.MAX_HEAD_BYTES:
            raise HttpError(f"a head of more than {head.MAX_HEAD_BYTES} bytes")
        if self._given_up is not None:
            return  # its turn comes when the poll has been answered
        if end < 0:
            if self._in:
                self._deadline.set(REQUEST_S)
            return
        request = head.parse_request(bytes(self._in[:end]))
        del self._in[: end + len(head.END)]
        self._closes = request.closes
        if head.content_length(request.headers):
            self.send(413, {"Content-Length": "0"})  # nothing here takes a body
            return
        self._deadline.clear()
        self._answer(self, request)

    def _flush(self) -> None:
        body, budget = self._out, TURN_BYTES
        if body is None:
            return
        while budget > 0:
            if self._head.left:
                views = [*self._head.views(), *body.views()[:900]]
            elif body.left:
                views = body.views()
            else:
                self._sent()
                return
            sent = self._sock.sendmsg(views)
            budget -= sent
            self._deadline.set(UNSENT_S)
            of_head = min(sent, self._head.left)
            self._head.advance(of_head)
            body.advance(sent - of_head)
            if self._source is not None:
                self._source[0].progressed()

    def _sent(self) -> None:
        self._let_go()
        self._loop.watch(self._sock.fileno(), READ, self._ready)
        if self._closes:
            # Not closed at once: unread bytes of the peer would turn that into a reset that overtakes the answer.
            self._lingers = True
            self._sock.shutdown(socket.SHUT_WR)
            self._deadline.set(LINGER_S)
            return
        self._deadline.set(IDLE_S)
        self._loop.call(partial(self._guarded, self._take_request))

    def _expired(self) -> None:
        if self._given_up is not None:
            self._given_up()
        else:
            self.end("nothing came for too long")
