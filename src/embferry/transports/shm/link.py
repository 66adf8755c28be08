"""The sending side of one shared-memory link: copies on worker threads, and the watch for the receiver's end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from embferry.protocol.errors import TransportError

from ..contract import LinkLost, Piece, Written
from ..net.loop import READ, Loop
from ..outbox import Outbox
from ..windows import ranges_of
from . import gate
from .peer import Peer

AT_ONCE_BYTES = 1 << 20
"""Up to this much is copied before another thread would have begun."""


class Link:
    """Writes to one receiver. It is over when it was told to :meth:`end` and the last copy has ended.

    :param forget: called at the end, before :class:`LinkLost` is posted.
    """

    def __init__(
        self, handle: bytes, peer: Peer, loop: Loop, outbox: Outbox, forget: Callable[[bytes, Link], None]
    ) -> None:
        self._handle, self._peer, self._loop, self._outbox, self._forget = handle, peer, loop, outbox, forget
        self._lock = threading.Lock()  # of _in_flight and _error
        self._in_flight = 0
        self._error: TransportError | None = None
        self._lost = False
        self._stop = threading.Event()
        loop.call(self._watch)

    def write(self, workers: ThreadPoolExecutor, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            error = self._error
            if error is None:
                self._in_flight += 1
        if error is not None:
            self._outbox.post(Written(ticket, error))
            return
        if sum(piece.source.nbytes for piece in pieces) > AT_ONCE_BYTES or not self._write_at_once(
            epoch, pieces, ticket
        ):
            workers.submit(self._work, epoch, pieces, ticket).add_done_callback(self._report_bug)

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Lets copies that have begun run to their end, answers all others with ``error``, then gives the memory up."""
        with self._lock:
            if self._error is not None:
                return
            self._error, self._lost = error, lost
            idle = self._in_flight == 0
        self._stop.set()
        if idle:
            self._over(error)

    def _write_at_once(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> bool:
        """Copies on the caller's thread, unless that would have to wait for the receiver."""
        try:
            error = self._copy(epoch, pieces, None)
        except gate.Busy:
            return False
        self._copied(ticket, error)
        return True

    def _work(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        self._copied(ticket, self._error or self._copy(epoch, pieces, self._stop))

    def _copied(self, ticket: int, error: TransportError | None) -> None:
        # A receiver that died meanwhile has nothing of it.
        self._outbox.post(Written(ticket, self._error if self._lost else error))
        with self._lock:
            self._in_flight -= 1
            over = self._error if self._in_flight == 0 else None
        if over is not None:
            self._over(over)

    def _copy(self, epoch: int, pieces: Sequence[Piece], stop: threading.Event | None) -> TransportError | None:
        peer = self._peer
        try:
            touched = peer.rows.touched(ranges_of(pieces))
        except OverflowError:
            touched = None
        if touched is None:
            return TransportError("the write leaves the receiver's region", retryable=False)
        try:
            with gate.entered(peer.gate_fd, peer.gates, epoch, touched, stop) as allowed:
                if not allowed:
                    return TransportError(f"no open window of epoch {epoch} covers the write", retryable=False)
                for piece in pieces:
                    if piece.source.nbytes:
                        # numpy's copy, unlike memoryview's, lets other threads run meanwhile.
                        source = np.frombuffer(piece.source, np.uint8)
                        np.copyto(peer.region[piece.offset : piece.offset + source.size], source)
        except OSError as error:
            return TransportError(f"the receiver's gate cannot be locked: {error}")
        return None

    def _over(self, error: TransportError) -> None:
        self._loop.call(self._release)
        self._forget(self._handle, self)
        if self._lost:
            self._outbox.post(LinkLost(self._handle, error))

    # On the loop's thread.

    def _watch(self) -> None:
        self._loop.watch(self._peer.life_fd, READ, self._on_death)
        self._loop.watch(self._peer.pid_fd, READ, self._on_death)

    def _on_death(self, _: int) -> None:
        self._loop.unwatch(self._peer.life_fd)
        self._loop.unwatch(self._peer.pid_fd)
        self.end(TransportError("the receiver closed its region or died"), lost=True)

    def _release(self) -> None:
        self._loop.unwatch(self._peer.life_fd)
        self._loop.unwatch(self._peer.pid_fd)
        self._peer.close()

    def _report_bug(self, done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._outbox.fail(error)
