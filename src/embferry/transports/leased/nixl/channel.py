"""One connection that carries messages, on the transport's loop. Never waits."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable

from ...net.loop import READ, WRITE, Loop
from .messages import LENGTH, FrameError, Message, decode, encode

READ_BYTES = 1 << 16
MAX_UNSENT = 64 << 20  # bytes a peer may leave unread before it is given up: it has stopped or means harm


class Channel:
    """All but ``send`` is for the loop's thread.

    :param on_message: called for each message; a ``FrameError`` that it raises goes to ``on_fault``.
    :param on_fault: the peer broke the format. Nothing more is read as messages; the caller decides what next.
    :param on_end: called once when no more will come: the peer hung up, or the connection broke (then: how).
    :param limit: bytes of a frame; to be raised when the peer has shown who it is.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: Loop,
        *,
        on_message: Callable[[Message], None],
        on_fault: Callable[[FrameError], None],
        on_end: Callable[[str], None],
        limit: int,
    ) -> None:
        self.sock, self._loop, self.limit = sock, loop, limit
        self._on_message, self._on_fault, self._on_end = on_message, on_fault, on_end
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._deaf = self._ended = False
        self._lock = threading.Lock()  # of _outgoing, and of the socket against being closed under a send
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.watch(sock.fileno(), READ, self._ready)

    def send(self, message: Message) -> None:
        """From any thread: what the kernel takes is on its way at the return. Nothing once the channel has ended."""
        frame = encode(message)
        with self._lock:
            if self._ended:
                return
            first = not self._outgoing
            self._outgoing += LENGTH.pack(len(frame)) + frame
            if first:  # else it is watched already
                try:
                    self._push()
                except OSError as error:
                    reason = os.strerror(error.errno or 0)
                    self._loop.call(lambda: self._finish(reason))
                    return
                if self._outgoing:
                    self._loop.call(self._watch)

    def hang_up(self) -> None:
        """Says that nothing more will come from here. What the peer says is read and dropped, until it hangs up too."""
        self._deaf = True
        if not self._ended:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._finish(os.strerror(error.errno or 0))

    def close(self) -> None:
        """Ends at once, ``on_end`` is not called. Idempotent."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._loop.unwatch(self.sock.fileno())
            self.sock.close()

    def _finish(self, reason: str) -> None:
        if not self._ended:
            self.close()
            self._on_end(reason)

    def _ready(self, events: int) -> None:
        if self._ended:
            return
        try:
            if events & WRITE:
                with self._lock:
                    self._push()
                self._watch()
            if events & READ:
                self._read()
        except BlockingIOError:  # from the read
            return
        except OSError as error:
            self._finish(os.strerror(error.errno or 0))

    def _read(self) -> None:
        received = self.sock.recv(READ_BYTES)
        if not received:
            self._finish("it hung up")
            return
        if self._deaf:
            return
        self._incoming += received
        try:
            while not (self._ended or self._deaf) and (frame := self._next_frame()) is not None:
                self._on_message(decode(frame))
        except FrameError as error:
            self._deaf = True
            self._on_fault(error)

    def _next_frame(self) -> bytes | None:
        if len(self._incoming) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._incoming)
        if not 1 <= length <= self.limit:
            raise FrameError(f"a frame of {length} bytes; 1 to {self.limit} are allowed")
        end = LENGTH.size + length
        if len(self._incoming) < end:
            return None
        frame = bytes(self._incoming[LENGTH.size : end])
        del self._incoming[:end]
        return frame

    def _push(self) -> None:
        """With the lock held."""
        try:
            while self._outgoing:
                del self._outgoing[: self.sock.send(self._outgoing)]
        except BlockingIOError:
            if len(self._outgoing) > MAX_UNSENT:
                raise OSError(errno.ENOBUFS, "the peer does not read") from None

    def _watch(self) -> None:
        if not self._ended:
            self._loop.watch(self.sock.fileno(), READ | WRITE if self._outgoing else READ, self._ready)
