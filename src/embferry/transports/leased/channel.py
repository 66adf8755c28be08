"""One connection of the side channel, on the transport's loop. Never blocks."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable
from functools import partial

from ..net.loop import READ, WRITE, Scope
from .messages import LENGTH, FrameError, Message, decode, encode

READ_BYTES = 1 << 16


class Channel:
    """Sends and receives messages. All but ``send`` is for the loop's thread.

    The callbacks run on the loop's thread, with no lock held, and must not block.

    Args:
        sock: Connected; closed by the channel.
        on_message: Called for each message; a ``FrameError`` that it raises goes to ``on_fault``.
        on_fault: The peer broke the format. Nothing more is read as messages; the caller decides what happens next.
        on_end: Called once, with the reason, when no more will come: the peer hung up, or the connection broke.
        limit: Largest frame that is accepted, bytes; to be raised when the peer has shown its token.
        max_unsent: Bytes the peer may leave unread before it is given up, because it has stopped or means harm.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: Scope,
        *,
        on_message: Callable[[Message], None],
        on_fault: Callable[[FrameError], None],
        on_end: Callable[[str], None],
        limit: int,
        max_unsent: int,
    ) -> None:
        self.sock, self._loop, self.limit, self._max_unsent = sock, loop, limit, max_unsent
        self._on_message, self._on_fault, self._on_end = on_message, on_fault, on_end
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._deaf = self._hung_up = self._ended = False
        self._lock = threading.Lock()  # of _outgoing, and of the socket against being closed under a send
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # the peer may have left already; reading will tell
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.watch(sock.fileno(), READ, self._ready)

    def send(self, message: Message) -> None:
        """Sends ``message``, from any thread. Does nothing once the channel has ended or hung up."""
        frame = encode(message)
        with self._lock:
            if self._ended or self._hung_up:
                return
            idle = not self._outgoing
            self._outgoing += LENGTH.pack(len(frame)) + frame
            if not idle:  # then the loop waits for the socket already
                return
            try:
                self._push()
            except OSError as error:
                self._loop.call(partial(self._broken, error))
                return
            if self._outgoing:
                self._loop.call(self._watch)

    def hang_up(self) -> None:
        """Ends the sending side. What the peer sends is dropped until it hangs up too."""
        self._deaf = True
        with self._lock:
            if self._ended or self._hung_up:
                return
            self._hung_up = True
            self._outgoing.clear()
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._loop.call(partial(self._broken, error))

    def close(self) -> None:
        """Ends at once; ``on_end`` is not called. Idempotent."""
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

    def _broken(self, error: OSError) -> None:
        self._finish(os.strerror(error.errno or 0))

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
            self._broken(error)

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
        """Hands the kernel what it takes. With the lock held."""
        try:
            while self._outgoing:
                del self._outgoing[: self.sock.send(self._outgoing)]
        except BlockingIOError:
            if len(self._outgoing) > self._max_unsent:
                raise OSError(errno.ENOBUFS, "the peer does not read") from None

    def _watch(self) -> None:
        if not self._ended:
            self._loop.watch(self.sock.fileno(), READ | WRITE if self._outgoing else READ, self._ready)
