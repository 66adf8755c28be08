"""One connection of the side channel, on the transport's loop. Never blocks."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable

from ..net.loop import READ, WRITE, Scope
from .messages import HEADER, FrameError, Message, check, decode, encode, framed

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16


class Channel:
    """Sends and receives messages. All but ``send`` is for the loop's thread.

    The callbacks run on the loop's thread, with no lock held, and must not block.

    Args:
        sock: Connected; closed by the channel.
        loop: The scope of the connection.
        on_message: Called for each message; a ``FrameError`` that it raises goes to ``on_fault``.
        on_fault: The peer broke the format, or a bug has kept this end from handling a message. Nothing more is read as
            messages; the caller decides what happens next.
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
        self._received = self._sent = 0  # frames
        self._deaf = self._mute = self._ended = False
        self._failure = ""  # why it cannot send
        self._lock = threading.Lock()  # of _outgoing and _sent, and of the socket against being closed under a send
        sock.setblocking(False)
        loop.watch(sock.fileno(), READ, self._ready)

    def send(self, message: Message) -> None:
        """Sends ``message``, from any thread. Does nothing once the channel has ended or hung up."""
        encoded = encode(message)
        with self._lock:
            if self._mute:
                return
            was_idle = not self._outgoing
            self._outgoing += framed(encoded, self._sent)
            self._sent += 1
            if was_idle:  # otherwise the loop waits for the socket already
                self._push()
            if len(self._outgoing) > self._max_unsent:
                self._fail("the peer does not read")
            blocked = was_idle and bool(self._outgoing)
        if blocked:  # without the lock: after its end, the loop runs calls at once
            self._loop.call(self._watch)

    def hang_up(self) -> None:
        """Ends the sending side. What the peer sends is dropped until it hangs up too."""
        self._deaf = True
        with self._lock:
            self._shut(socket.SHUT_WR)

    def go_on(self, loop: Scope) -> None:
        """After a failure of the scope: hangs up, and waits in a new scope for the peer to hang up too."""
        self._loop = loop
        self.hang_up()
        if not self._ended:
            loop.watch(self.sock.fileno(), READ, self._ready)

    def close(self) -> None:
        """Ends at once; ``on_end`` is not called. Idempotent."""
        with self._lock:
            if not self._ended:
                self._ended = self._mute = True
                self._loop.unwatch(self.sock.fileno())
                self.sock.close()

    def _finish(self, reason: str) -> None:
        if not self._ended:
            self.close()
            self._on_end(reason)

    def _ready(self, events: int) -> None:
        if self._ended:
            return
        if events & WRITE:
            with self._lock:
                self._push()
            self._watch()
        if self._failure:
            self._finish(self._failure)
        elif events & READ:
            self._read()

    def _read(self) -> None:
        try:
            received = self.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(os.strerror(error.errno or 0))
            return
        if not received:
            self._finish("it hung up")
        if self._deaf:
            return
        self._incoming += received
        try:
            while not (self._ended or self._deaf) and (frame := self._next_frame()) is not None:
                self._on_message(decode(frame))
        except FrameError as error:
            self._deaf = True
            self._on_fault(error)
        except Exception as bug:
            log.exception("a message of the side channel could not be handled")
            self._deaf = True
            self._on_fault(FrameError(f"this end failed to handle a message: {bug!r}"))

    def _next_frame(self) -> bytes | None:
        if len(self._incoming) < HEADER.size:
            return None
        length, expected = HEADER.unpack_from(self._incoming)
        if not 1 <= length <= self.limit:
            raise FrameError(f"a frame of {length} bytes; 1 to {self.limit} are allowed")
        end = HEADER.size + length
        if len(self._incoming) < end:
            return None
        frame = bytes(self._incoming[HEADER.size : end])
        del self._incoming[:end]
        if check(frame, self._received) != expected:
            raise FrameError("a frame that is damaged, or not the next one")
        self._received += 1
        return frame

    # With the lock held

    def _push(self) -> None:
        """Hands the kernel what it takes."""
        try:
            while self._outgoing:
                del self._outgoing[: self.sock.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(os.strerror(error.errno or 0))

    def _fail(self, reason: str) -> None:
        """Makes the socket readable, so that the loop ends the channel."""
        self._failure = reason
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        self._mute = True
        self._outgoing.clear()
        with contextlib.suppress(OSError):  # it is broken already
            self.sock.shutdown(how)

    def _watch(self) -> None:
        if not self._ended:
            self._loop.watch(self.sock.fileno(), READ | WRITE if self._outgoing else READ, self._ready)
