"""One connection of the control plane, whose peer has been greeted: handshake, frames both ways, time limits.

A connection is isolated: an exception in its callbacks ends this connection only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Hashable
from typing import Protocol

from embferry.protocol.errors import (
    CapacityError,
    EmbeddingTransferError,
    PeerGone,
    RemoteProtocolError,
    TlsFailed,
    shown,
)
from embferry.transports.net.deadlines import Deadlines
from embferry.transports.net.loop import READ, WRITE, Loop
from embferry.transports.net.stream import Stream, watch
from embferry.transports.net.tls_socket import TlsError
from embferry.trust import Trust
from embferry.trust.greeting import Greeting

from .contract import Received, Unreachable
from .framing import FrameReader, frame
from .handshake import MAX_HELLO, Handshake
from .limits import ControlLimits
from .outgoing import Budget, Outgoing

log = logging.getLogger(__name__)

RECEIVE_BYTES = 64 << 10  # in one call; other connections then get their turn


class Owner(Protocol):
    """The end of a connection in this process. Called on the driver thread."""

    def on_open(self, connection: Connection) -> None:
        """The handshake is done."""

    def on_frame(self, connection: Connection) -> None:
        """Whole frames have come."""

    def on_end(self, connection: Connection, error: EmbeddingTransferError) -> None:
        """The connection has ended and its socket is closed. Called once."""


class Shared:
    """The state that the connections of one control plane share.

    Attributes:
        events: Not yet polled.
        received_bytes: Bytes of the frames in ``events``.
        unsent: The bytes of all queues.
        dropped: Frames that were not sent.
        bad_frames: Connections that ended because of a damaged or impossible frame.
        dirty: Connections with frames that were queued since the last flush.
        greet: Makes the greeting of a connection that is dialled.
        trust: Has this end's certificate.
    """

    def __init__(self, loop: Loop, limits: ControlLimits, greet: Callable[[], Greeting], trust: Trust) -> None:
        self.loop, self.limits, self.greet, self.trust = loop, limits, greet, trust
        self.events: list[Received | Unreachable] = []
        self.received_bytes = 0
        self.unsent = Budget(limits.unsent_bytes)
        self.incomplete = Budget(limits.incomplete_bytes)
        self.dropped = self.bad_frames = 0
        self.dirty: dict[Connection, None] = {}
        self.hellos = Deadlines[Connection](loop, limits.hello_timeout, self._no_hello)
        self.incoming = Deadlines[Connection](loop, limits.frame_timeout, self._slow_frame)
        self.sending = Deadlines[Connection](loop, limits.send_timeout, self._not_reading)

    def outgoing(self) -> Outgoing:
        """Returns a new queue for one peer."""
        return Outgoing(self.limits.unsent_bytes_per_peer, self.unsent)

    def flush(self) -> None:
        """Hands the kernel what is queued."""
        while self.dirty:
            self.dirty.popitem()[0].push_guarded()

    def lost(self, peer: Hashable, error: EmbeddingTransferError) -> None:
        """Reports that nothing more goes to ``peer``."""
        self.events.append(Unreachable(peer, error))
        self.loop.wake()  # it may have been noticed outside of the loop's callbacks: poll without a wait

    def limit_incomplete(self) -> None:
        """Ends the connections whose frames began first until the rest is within the bound.

        An honest frame is complete within milliseconds, so the oldest ones are of peers that hold memory on purpose.
        """
        while self.incomplete.used > self.incomplete.limit and (oldest := self.incoming.earliest()) is not None:
            oldest.end(RemoteProtocolError("too many bytes of incomplete control frames are held"))

    def _no_hello(self, connection: Connection) -> None:
        connection.end(PeerGone(f"no hello came within {self.limits.hello_timeout:g} s of connecting"))

    def _slow_frame(self, connection: Connection) -> None:
        connection.end(PeerGone(f"a control frame was not complete within {self.limits.frame_timeout:g} s"))

    def _not_reading(self, connection: Connection) -> None:
        connection.end(PeerGone(f"the peer took no control message for {self.limits.send_timeout:g} s"))


class Connection:
    """Sends and receives frames over one connected socket. Driver thread only.

    Args:
        sock: Connected; closed by the connection, also if the constructor raises.
        peer: Stands for the other end in events.
        outgoing: Sent once the handshake is done; the queue belongs to the owner.

    Attributes:
        open: Whether the handshake is done and the connection has not ended.
        opened_at: When the handshake was done.
        frames: Whole frames received.

    Raises:
        OSError: The connection is broken already.
    """

    def __init__(
        self, sock: Stream, peer: Hashable, outgoing: Outgoing, shared: Shared, owner: Owner, label: str
    ) -> None:
        self.peer, self.outgoing, self.label = peer, outgoing, label
        self.open = self._ended = self._blocked = False
        self.opened_at = 0.0
        self.frames = 0
        self._sock, self._shared, self._owner = sock, shared, owner
        self._handshake = Handshake()
        self._reader = FrameReader(MAX_HELLO)
        self._held = 0
        self._scope = shared.loop.scope(self._failed)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(frame(self._handshake.first()))  # a new socket has room for it
            watch(self._scope, sock, READ, self._on_ready)
        except BaseException:
            sock.close()
            raise

    def send(self, encoded: bytes) -> bool:
        """Queues an encoded frame, which is sent with the next flush. Returns False if the queue is full."""
        if not self.outgoing.add(encoded):
            return False
        if self.open and not self._blocked:
            self._shared.dirty[self] = None
        return True

    def push(self) -> None:
        """Hands the kernel what it takes of the queue."""
        if not self.open:
            return
        moved = False
        try:
            while self.outgoing.bytes:
                buffers = self.outgoing.buffers()
                count = self._sock.send(buffers[0]) if len(buffers) == 1 else self._sock.sendmsg(buffers)
                self.outgoing.advance(count)
                moved = True
        except BlockingIOError:
            if moved or not self._blocked:
                self._shared.sending.start(self)
            if not self._blocked:
                self._blocked = True
                watch(self._scope, self._sock, READ | WRITE, self._on_ready)
            return
        except OSError as error:
            self.end(_gone(error))
            return
        if self._blocked:
            self._blocked = False
            self._shared.sending.stop(self)
            watch(self._scope, self._sock, READ, self._on_ready)

    def push_guarded(self) -> None:
        """Does :meth:`push`, for a caller that must not be harmed by this connection."""
        self._scope.run(self.push)

    def push_within(self, timeout_s: float) -> None:
        """Sends the queue for up to ``timeout_s`` seconds, as the last thing before the end."""
        until = time.monotonic() + timeout_s
        self.push()
        while self.open and self.outgoing and (left := until - time.monotonic()) > 0:
            self._sock.settimeout(left)
            try:
                self.outgoing.advance(self._sock.send(self.outgoing.buffers()[0]))
            except OSError as error:
                self.end(_gone(error))
        if self.open:
            self._sock.setblocking(False)
            with contextlib.suppress(OSError):  # closing with unread bytes would take back what was just sent
                while self._sock.recv(RECEIVE_BYTES):
                    pass

    def make_room(self, reason: str) -> bool:
        """Ends the connection for the sake of others."""
        self.end(CapacityError(reason))
        return True

    def end(self, error: EmbeddingTransferError, *, closed_here: bool = False) -> None:
        """Closes the connection and tells the owner. Idempotent. ``closed_here``: this end wants it: no news."""
        if self._ended:
            return
        self._ended, self.open = True, False
        level = logging.DEBUG if closed_here else logging.INFO
        log.log(level, "the control connection with %s has ended: %s", self.label, error)
        shared = self._shared
        for deadlines in (shared.hellos, shared.incoming, shared.sending):
            deadlines.stop(self)
        shared.dirty.pop(self, None)
        shared.incomplete.used -= self._held
        self._held = 0
        self._scope.end()
        if not shared.loop.forked:  # in a child it would end the parent's connection
            with contextlib.suppress(OSError):  # the peer notices even if a forked child has a copy
                self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._owner.on_end(self, error)

    def _failed(self, error: BaseException) -> None:
        self.end(PeerGone(f"this end failed to handle the connection: {shown(error)}"))

    def _on_ready(self, events: int) -> None:
        if events & WRITE:
            self.push()
        if events & READ and not self._ended and self._shared.received_bytes < self._shared.limits.received_bytes:
            self._receive()

    def _receive(self) -> None:
        try:
            received = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(_gone(error))
            return
        if not received:
            self.end(PeerGone("the peer closed the connection"))
            return
        try:
            self._take(received)
        except EmbeddingTransferError as error:
            self._shared.bad_frames += 1
            level = logging.WARNING if self.open else logging.INFO  # the latter: anything that scans ports
            log.log(level, "closing the control connection with %s: %s", self.label, error)
            self.end(error)

    def _take(self, received: bytes) -> None:
        before = self.frames
        for payload in self._reader.feed(received):
            if not self.open:
                self._greet(payload)
                if self._ended:
                    return
                continue
            self.frames += 1
            self._shared.received_bytes += len(payload)
            self._shared.events.append(Received(self.peer, payload))
        if self.frames != before:
            self._owner.on_frame(self)
        self._hold(self._reader.held, self.frames != before)

    def _greet(self, payload: bytes) -> None:
        self._handshake.receive(payload)
        if self._handshake.done:
            self._reader.limit = self._shared.limits.frame_bytes
            self._shared.hellos.stop(self)
            self.open, self.opened_at = True, self._shared.loop.now()
            self._owner.on_open(self)
            self.push()

    def _hold(self, held: int, another: bool) -> None:
        """Accounts for the bytes of the frame that has begun; ``another``: it is not the one of the last call."""
        if held == self._held == 0:
            return
        shared = self._shared
        shared.incomplete.used += held - self._held
        self._held = held
        if not held or not self.open:  # without a hello, its own time limit counts
            shared.incoming.stop(self)
        elif another or self not in shared.incoming:
            shared.incoming.start(self)
        shared.limit_incomplete()


def _gone(error: OSError) -> PeerGone | TlsFailed:
    if isinstance(error, TlsError):
        return error.failure
    return PeerGone(f"the control connection broke: {os.strerror(error.errno or 0) if error.errno else error}")
