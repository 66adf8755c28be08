"""The sending end of a connection: sends writes straight from the source memory and receives their verdicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from embferry.protocol.errors import TransportError, TransportStalled
from embferry.trust.greeting import Greeting
from embferry.trust.tls import Tls

from ..contract import Piece, Written
from ..net.connector import Connector
from ..net.cursor import Cursor
from ..net.deadlines import Timeout
from ..net.link import OnEnd, SocketLink, refused
from ..net.loop import READ, WRITE, Scope
from ..net.stream import watch
from ..outbox import Outbox
from ..windows import Ranges
from . import framing
from .framing import FrameError

TURN_BYTES = 32 << 20  # sent to one receiver before the others get their turn
SMALL_BYTES = 2 << 20  # with its head: 1 MiB, a small picture, is small
MAX_OVERTAKES = 16  # small frames in a row that may overtake large ones


class SendLink(SocketLink):
    """A connection to a receiver. All methods but the constructor and ``write`` are for the loop's thread.

    Args:
        stall_timeout_s: The link is lost when writes are in flight, and for this time the receiver has neither ended
            one nor reported progress. That this end's kernel takes bytes means nothing.
        greet: Makes the greeting of the connection.
        tls: The certificate for the connection; None: it is not encrypted.

    Raises:
        TransportError: The connection is refused at once.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: bytes,
        connect_timeout_s: float,
        stall_timeout_s: float,
        loop: Scope,
        outbox: Outbox,
        on_end: OnEnd,
        greet: Callable[[], Greeting],
        tls: Tls | None,
    ) -> None:
        super().__init__(loop, outbox, on_end)
        self._stall_timeout_s = stall_timeout_s
        self._stall = Timeout(self.scope, self._on_stall)
        self._in_flight: dict[int, None] = {}
        self._acknowledged = 0  # bytes of payloads
        self._outgoing: deque[Cursor] = deque([Cursor([memoryview(framing.hello(token))])])
        self._overtakes = 0
        self._received = bytearray()
        failed = partial(self.end, lost=True)
        self._connector = Connector(address, self.scope, connect_timeout_s, self._on_connected, failed, greet, tls)
        self._sock = self._connector.sock
        self._connector.start()

    def _enter(self, epoch: int, ranges: Ranges, pieces: Sequence[Piece], ticket: int) -> Callable[[], None]:
        views = [memoryview(framing.head(epoch, ticket, ranges)), *(piece.source.cast("B") for piece in pieces)]
        self._in_flight[ticket] = None
        return partial(self.scope.call, partial(self._send, Cursor(views)))

    def end(self, error: TransportError, *, lost: bool) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
        self.scope.end()
        self._sock.close()
        self._outgoing.clear()
        self._on_end(self, self._in_flight, error, lost)

    def _on_connected(self) -> None:
        if self._in_flight:
            self._stall.set(self._stall_timeout_s)
        self._turn(WRITE)

    def _send(self, frame: Cursor) -> None:
        if self._error is None:
            self._enqueue(frame)
            if self._connector.connected:
                if not self._stall.is_set:
                    self._stall.set(self._stall_timeout_s)
                self._turn(WRITE)

    def _enqueue(self, frame: Cursor) -> None:
        """Queues a frame; a small one overtakes large ones that have not begun, a limited number of times in a row."""
        at = len(self._outgoing)
        if frame.left <= SMALL_BYTES and self._overtakes < MAX_OVERTAKES:
            while at > 1 and self._outgoing[at - 1].left > SMALL_BYTES:
                at -= 1
        self._overtakes = self._overtakes + 1 if at < len(self._outgoing) else 0
        self._outgoing.insert(at, frame)

    def _turn(self, events: int) -> None:
        try:
            if events & WRITE:
                self._flush()
            if events & READ:
                self._receive_verdicts()
        except (OSError, FrameError) as error:
            self.end(TransportError(f"the connection to the receiver broke: {error}"), lost=True)
            return
        if self._error is None:
            watch(self.scope, self._sock, READ | WRITE if self._outgoing else READ, self._turn)

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
            if not cursor.left:
                self._outgoing.popleft()

    def _receive_verdicts(self) -> None:
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise FrameError("the receiver closed the connection")
        self._received += data
        size = framing.VERDICT.size
        whole = len(self._received) // size * size
        for at in range(0, whole, size):
            self._on_verdict(*framing.parse_verdict(self._received[at : at + size]))
        del self._received[:whole]
        if whole and self._in_flight:
            self._stall.set(self._stall_timeout_s)
        elif whole:
            self._stall.clear()

    def _on_stall(self) -> None:
        after = f"took {self._acknowledged} bytes of payload, then " if self._acknowledged else ""
        why = f"the receiver {after}acknowledged nothing for {self._stall_timeout_s:g} s"
        self.end(TransportStalled(why), lost=True)

    def _on_verdict(self, ticket: int, verdict: int) -> None:
        if verdict == framing.RECEIVING:
            if ticket <= self._acknowledged:
                raise FrameError("a report on progress without progress")
            self._acknowledged = ticket
            return
        if ticket not in self._in_flight:
            raise FrameError(f"a verdict on write {ticket}, which is not in flight")
        del self._in_flight[ticket]
        self._outbox.post(Written(ticket, refused() if verdict == framing.REFUSED else None))
