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

from ..contract import Region
from ..net.connector import set_keepalive
from ..net.cursor import Cursor
from ..net.listener import Listener
from ..net.loop import READ, WRITE, Scope
from ..outbox import Outbox
from ..receive_region import Permit, ReceiveRegion
from ..windows import RANGE_BYTES, parse_ranges
from . import framing
from .framing import FrameError, Head

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
MAX_UNSENT_BYTES = 1 << 20  # of verdicts that a sender does not read
MAX_CONNECTIONS = 1024
TURN_BYTES = 32 << 20  # received from one connection before the others get their turn


class ReceiveServer(ReceiveRegion):
    """Receives the writes of all senders into one region."""

    def __init__(self, region: Region, token: bytes, sock: socket.socket, loop: Scope, outbox: Outbox) -> None:
        super().__init__(region, outbox)
        self.token = token
        self.loop = loop
        self.scratch = memoryview(bytearray(256 << 10))  # for refused payloads
        self.listener = Listener(sock, loop, "a sender", MAX_CONNECTIONS, partial(SenderConnection, self))
        self.listener.start()

    def stop(self) -> None:
        """Ends the listener and every connection. Runs on the loop's thread."""
        self.listener.stop()
        for connection in list(self.listener.connections):
            connection.end("the receiver is closed", logging.DEBUG)


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

    def __init__(self, server: ReceiveServer, sock: socket.socket, peer: str) -> None:
        self._server, self._sock, self._peer = server, sock, peer
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_keepalive(sock)
        self._unsent = bytearray()
        self._authenticated = False
        self._ended = False
        self._write: _IncomingWrite | None = None
        self._on_full: Callable[[bytearray], None]
        self._expect(framing.HELLO.size, self._on_hello)
        server.loop.watch(sock.fileno(), READ, self._ready)
        server.loop.later(HANDSHAKE_S, self._check_authenticated)

    def end(self, reason: str, level: int = logging.WARNING) -> None:
        if self._ended:
            return
        self._ended = True
        log.log(level, "closed the connection of the sender at %s: %s", self._peer, reason)
        self._server.loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._server.listener.connections.discard(self)
        self._write = None

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._send_verdicts()
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
        if received and write.left == 0:
            self._finish(write)
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
        self._authenticated = True
        self._expect(framing.HEAD.size, self._on_head)

    def _check_authenticated(self) -> None:
        if not self._authenticated:
            self.end(f"it did not send the token within {HANDSHAKE_S} s")

    def _on_head(self, data: bytearray) -> None:
        head = framing.parse_head(data)
        self._expect(head.ranges * RANGE_BYTES, partial(self._on_ranges, head))

    def _on_ranges(self, head: Head, data: bytearray) -> None:
        ranges = parse_ranges(data, head.payload)
        if ranges is None:
            raise FrameError(f"the lengths of the ranges do not add up to the payload of {head.payload} bytes")
        windows, view = self._server.windows, self._server.view
        permit = Permit(windows, head.epoch, windows.rows.touched(ranges))
        # A range that leaves its field may leave the region too.
        views = [] if permit.refused else [view[offset : offset + length] for offset, length in ranges.tolist()]
        write = _IncomingWrite(head, permit, views)
        self._write = write
        if head.payload == 0:
            self._finish(write)

    def _finish(self, write: _IncomingWrite) -> None:
        with self._server.lock:  # the last check, and the only one of an empty write
            verdict = framing.WRITTEN if write.permit.holds() else framing.REFUSED
        self._write = None
        self._expect(framing.HEAD.size, self._on_head)
        self._unsent += framing.verdict_frame(write.head.ticket, verdict)
        self._send_verdicts()

    def _send_verdicts(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._unsent[: self._sock.send(self._unsent)]
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise FrameError("it does not read the verdicts on its writes")
        self._server.loop.watch(self._sock.fileno(), READ | WRITE if self._unsent else READ, self._ready)
