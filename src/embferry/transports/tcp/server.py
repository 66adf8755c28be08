"""The receiving side: accepts senders, and receives their payloads straight into the blocks.

All connections live on the transport's one thread, which asks before each ``recvmsg_into`` whether the payload may
still land (:mod:`..base.landing`).
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
from collections.abc import Callable
from functools import partial

from ..contract import Region
from ..net.cursor import Cursor
from ..net.listener import Listener
from ..net.loop import READ, WRITE, Loop
from ..outbox import Outbox
from ..receive_region import Permit, ReceiveRegion
from . import framing
from .framing import FrameError, Head

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
MAX_UNREAD_ANSWERS = 1 << 20  # bytes of answers a sender may leave unread before it is dropped
MAX_CONNECTIONS = 1024
TURN_BYTES = 32 << 20  # received from one connection before the others get their turn


class Server(ReceiveRegion):
    """Everything that receives into one region."""

    def __init__(self, region: Region, token: bytes, sock: socket.socket, loop: Loop, outbox: Outbox) -> None:
        super().__init__(region, outbox)
        self.token = token
        self.loop = loop
        self.scratch = memoryview(bytearray(256 << 10))  # refused payloads end here
        self.listener = Listener(sock, loop, "a sender", MAX_CONNECTIONS, partial(Incoming, self))
        self.listener.start()

    def stop(self) -> None:
        """On the loop's thread: ends every connection and the listening."""
        self.listener.stop()
        for connection in list(self.listener.connections):
            connection.end("the receiver is closed", logging.DEBUG)


class _Write:
    """One write that is being received."""

    def __init__(self, head: Head, permit: Permit, views: list[memoryview]) -> None:
        self.head, self.permit = head, permit
        self.cursor = Cursor(views)
        self.left = head.payload


class Incoming:
    """One sender. ``_stage`` is what to do with the buffer when it is full; a payload has no buffer of its own."""

    def __init__(self, server: Server, sock: socket.socket, address: str) -> None:
        self._server, self._sock, self._address = server, sock, address
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = bytearray()
        self._greeted = False
        self._ended = False
        self._write: _Write | None = None
        self._stage: Callable[[bytearray], None]
        self._expect(framing.HELLO.size, self._on_hello)
        server.loop.watch(sock.fileno(), READ, self._ready)
        server.loop.later(HANDSHAKE_S, self._check_greeting)

    def end(self, reason: str, level: int = logging.WARNING) -> None:
        if self._ended:
            return
        self._ended = True
        log.log(level, "closed the connection of the sender at %s: %s", self._address, reason)
        self._server.loop.unwatch(self._sock.fileno())
        self._sock.close()
        self._server.listener.connections.discard(self)
        self._write = None

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._send_answers()
            budget = TURN_BYTES
            while events & READ and budget > 0 and not self._ended:
                received = self._receive()
                if received == 0:
                    clean = self._write is None and self._filled == 0
                    self.end("it closed" if clean else "it closed in the middle", logging.DEBUG)
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
                self._stage(self._buffer)
            return received
        received = self._receive_payload(write)
        write.left -= received
        if received and write.left == 0:
            self._finish(write)
        return received

    def _receive_payload(self, write: _Write) -> int:
        with self._server.lock:
            if write.permit.holds():
                received = self._sock.recvmsg_into(write.cursor.views())[0]
                write.cursor.advance(received)
                return received
        write.cursor.release()
        return self._sock.recv_into(self._server.scratch[: min(write.left, self._server.scratch.nbytes)])

    def _expect(self, size: int, stage: Callable[[bytearray], None]) -> None:
        self._buffer, self._filled, self._stage = bytearray(size), 0, stage

    def _on_hello(self, data: bytearray) -> None:
        if not hmac.compare_digest(framing.parse_hello(data), self._server.token):
            raise FrameError("wrong token: it does not come from this receiver's handle")
        self._greeted = True
        self._expect(framing.HEAD.size, self._on_head)

    def _check_greeting(self) -> None:
        if not self._greeted:
            self.end(f"it did not introduce itself within {HANDSHAKE_S} s")

    def _on_head(self, data: bytearray) -> None:
        head = framing.parse_head(data)
        self._expect(head.ranges * framing.RANGE_BYTES, partial(self._on_ranges, head))

    def _on_ranges(self, head: Head, data: bytearray) -> None:
        ranges = framing.parse_ranges(data, head.payload)
        windows, view = self._server.windows, self._server.view
        permit = Permit(windows, head.epoch, windows.rows.touched(ranges))
        # A range that leaves its field may leave the region too.
        views = [] if permit.refused else [view[offset : offset + length] for offset, length in ranges.tolist()]
        write = _Write(head, permit, views)
        self._write = write
        if head.payload == 0:
            self._finish(write)

    def _finish(self, write: _Write) -> None:
        with self._server.lock:  # the last word, and for a write without a payload the only one
            verdict = framing.WRITTEN if write.permit.holds() else framing.REFUSED
        self._write = None
        self._expect(framing.HEAD.size, self._on_head)
        self._answers += framing.answer(write.head.ticket, verdict)
        self._send_answers()

    def _send_answers(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._answers[: self._sock.send(self._answers)]
        if len(self._answers) > MAX_UNREAD_ANSWERS:
            raise FrameError("it does not read the answers to its writes")
        self._server.loop.watch(self._sock.fileno(), READ | WRITE if self._answers else READ, self._ready)
