"""The receiver's server: accepts senders and receives their payloads straight into the blocks.

All connections are served by the transport's thread. Before each ``recvmsg_into`` it checks the permit
(:mod:`..receive_region`).
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
from collections.abc import Callable
from functools import partial

from embferry.protocol.errors import shown
from embferry.trust.greeting import Greeting
from embferry.trust.tls import Tls

from ..contract import Region
from ..net.cursor import Cursor
from ..net.listener import Listener, ListenLimits
from ..net.loop import READ, WRITE, Scope
from ..net.stalls import RECEIVING_BYTES
from ..net.stream import Stream, watch
from ..outbox import Outbox
from ..receive_region import Permit, ReceiveRegion
from ..windows import RANGE_BYTES, parse_ranges
from . import framing
from .framing import FrameError, Head

log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 1 << 20  # of verdicts that a sender does not read
TURN_BYTES = 32 << 20  # received from one connection before the others get their turn


class ReceiveServer(ReceiveRegion):
    """Receives the writes of all senders into one region.

    Args:
        progress_s: Seconds between two reports on the progress of a payload.
        greet: Makes the greeting of a connection.
        tls: The certificate for connections; None: they are not encrypted.
    """

    def __init__(
        self,
        region: Region,
        token: bytes,
        sock: socket.socket,
        loop: Scope,
        outbox: Outbox,
        limits: ListenLimits,
        progress_s: float,
        greet: Callable[[], Greeting],
        tls: Tls | None,
    ) -> None:
        super().__init__(region, outbox)
        self.token = token
        self.loop, self.progress_s = loop, progress_s
        self.scratch = memoryview(bytearray(256 << 10))  # for refused payloads
        accept = partial(SenderConnection, self)
        self.listener = Listener(sock, loop, "a sender", limits, accept, greet=greet, tls=tls)
        self.listener.start()

    def stop(self) -> None:
        """Ends the listener and every connection. Runs on the loop's thread."""
        self.listener.stop()
        for connection in self.listener.connections:
            connection.scope.run(connection.end, "the receiver is closed", logging.DEBUG)


class _IncomingWrite:
    """A write that is being received."""

    def __init__(self, head: Head, permit: Permit, views: list[memoryview]) -> None:
        self.head, self.permit = head, permit
        self.cursor = Cursor(views)
        self.left = head.payload


class SenderConnection:
    """The connection of one sender. For the loop's thread.

    ``_on_full`` is called with ``_buffer`` when that is full. Payloads go into the region and have no buffer.
    """

    def __init__(self, server: ReceiveServer, sock: Stream, peer: tuple[str, int]) -> None:
        self._server, self._sock, self._peer = server, sock, peer
        self.scope = server.loop.scope(self._failed)
        self._unsent = bytearray()
        self._ended = False
        self._received = 0  # bytes of payloads
        self._reported_at = 0.0
        self._told = 0  # bytes of payloads when the own side was told
        self._write: _IncomingWrite | None = None
        self._on_full: Callable[[bytearray], None]
        self._expect(framing.HELLO.size, self._on_hello)
        watch(self.scope, sock, READ, self._ready)

    def end(self, reason: str, level: int = logging.WARNING) -> None:
        if self._ended:
            return
        self._ended = True
        log.log(level, "closed the connection of the sender at %s: %s", self._peer, reason)
        self._server.listener.ended(self)
        self.scope.end()
        self._sock.close()
        self._write = None

    def make_room(self, reason: str) -> bool:
        self.end(reason, logging.INFO)
        return True

    def _failed(self, error: BaseException) -> None:
        self.end(f"this end failed to handle it: {shown(error)}")

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._send_verdicts()
            if events & READ:
                self._server.listener.served(self)
            budget = TURN_BYTES
            while events & READ and budget > 0 and not self._ended:
                received = self._receive()
                if received == 0:
                    clean = self._write is None and self._filled == 0
                    self.end("the peer closed it" if clean else "the peer closed it within a frame", logging.DEBUG)
                budget -= received
        except BlockingIOError:
            return
        except FrameError as error:
            self.end(str(error))
        except OSError as error:
            self.end(str(error), logging.INFO)

    def _receive(self) -> int:
        write = self._write
        if write is None or write.left == 0:
            received = self._sock.recv_into(memoryview(self._buffer)[self._filled :])
            self._filled += received
            if received and self._filled == len(self._buffer):
                self._on_full(self._buffer)
            return received
        received = self._receive_payload(write)
        write.left -= received
        self._received += received
        if received and write.left == 0:
            self._finish(write)
        elif received and self.scope.now() - self._reported_at >= self._server.progress_s:
            self._report(framing.progress_frame(self._received))
            if self._received - self._told >= RECEIVING_BYTES and not write.permit.refused:
                self._told = self._received
                self._server.receiving(write.head.epoch)
        return received

    def _receive_payload(self, write: _IncomingWrite) -> int:
        with self._server.lock:
            if write.permit.holds():
                received = self._sock.recvmsg_into(write.cursor.views())[0]
                write.cursor.advance(received)
                return received
        write.cursor.release()
        return self._sock.recv_into(self._server.scratch[: min(write.left, self._server.scratch.nbytes)])

    def _expect(self, size: int, on_full: Callable[[bytearray], None]) -> None:
        self._buffer, self._filled, self._on_full = bytearray(size), 0, on_full

    def _on_hello(self, data: bytearray) -> None:
        if not hmac.compare_digest(framing.parse_hello(data), self._server.token):
            raise FrameError("wrong token: it is not the one of this receiver's handle")
        self._expect(framing.HEAD.size, self._on_head)
        self._server.listener.opened(self)
        self._server.listener.served(self)  # the token is known to those that a transfer has invited

    def _on_head(self, data: bytearray) -> None:
        head = framing.parse_head(data)
        self._expect(head.ranges * RANGE_BYTES, partial(self._on_ranges, head))

    def _on_ranges(self, head: Head, data: bytearray) -> None:
        head.verify(data)
        ranges = parse_ranges(data, head.payload)
        if ranges is None:
            raise FrameError(f"the lengths of the ranges do not add up to the payload of {head.payload} bytes")
        windows, view = self._server.windows, self._server.view
        permit = Permit(windows, head.epoch, windows.rows.touched(ranges))
        # A range that leaves its field may leave the region too.
        views = [] if permit.refused else [view[offset : offset + length] for offset, length in ranges.tolist()]
        write = _IncomingWrite(head, permit, views)
        self._write, self._reported_at = write, self.scope.now()
        if head.payload == 0:
            self._finish(write)

    def _finish(self, write: _IncomingWrite) -> None:
        with self._server.lock:  # the last check, and the only one of an empty write
            verdict = framing.WRITTEN if write.permit.holds() else framing.REFUSED
        self._write = None
        self._expect(framing.HEAD.size, self._on_head)
        self._report(framing.verdict_frame(write.head.ticket, verdict))

    def _report(self, frame: bytes) -> None:
        self._reported_at = self.scope.now()
        self._unsent += frame
        self._send_verdicts()

    def _send_verdicts(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._unsent[: self._sock.send(self._unsent)]
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise FrameError("it does not read the verdicts on its writes")
        watch(self.scope, self._sock, READ | WRITE if self._unsent else READ, self._ready)
