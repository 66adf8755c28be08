"""The sending end of a link: copies into the receiver's region on worker threads, and notices the receiver's end."""

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
from . import revocation_table
from .peer import Peer

INLINE_BYTES = 1 << 20  # up to this size, a copy takes less time than handing it to another thread


class SendLink:
    """Writes to one receiver. The link has ended when :meth:`end` was called and the last copy has ended.

    ``write`` and ``end`` are for any thread.

    Args:
        on_end: Called once when the link has ended, on any thread, before :class:`LinkLost` is posted.
    """

    def __init__(
        self, handle: bytes, peer: Peer, loop: Loop, outbox: Outbox, on_end: Callable[[bytes, SendLink], None]
    ) -> None:
        self._handle, self._peer, self._loop, self._outbox, self._on_end = handle, peer, loop, outbox, on_end
        self._lock = threading.Lock()  # guards _in_flight and _error
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
        if sum(piece.source.nbytes for piece in pieces) > INLINE_BYTES or not self._write_inline(epoch, pieces, ticket):
            workers.submit(self._work, epoch, pieces, ticket).add_done_callback(self._report_bug)

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Lets copies that have begun finish, ends all other writes with ``error``, then releases the memory."""
        with self._lock:
            if self._error is not None:
                return
            self._error, self._lost = error, lost
            idle = self._in_flight == 0
        self._stop.set()
        if idle:
            self._finish(error)

    def _write_inline(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> bool:
        """Copies on the caller's thread, unless it would have to wait for the receiver; returns whether it did."""
        try:
            error = self._copy(epoch, pieces, None)
        except revocation_table.Busy:
            return False
        self._copied(ticket, error)
        return True

    def _work(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        self._copied(ticket, self._error or self._copy(epoch, pieces, self._stop))

    def _copied(self, ticket: int, error: TransportError | None) -> None:
        # A write to a receiver that died meanwhile has failed.
        self._outbox.post(Written(ticket, self._error if self._lost else error))
        with self._lock:
            self._in_flight -= 1
            final = self._error if self._in_flight == 0 else None
        if final is not None:
            self._finish(final)

    def _copy(self, epoch: int, pieces: Sequence[Piece], stop: threading.Event | None) -> TransportError | None:
        peer = self._peer
        try:
            touched = peer.rows.touched(ranges_of(pieces))
        except OverflowError:
            touched = None
        if touched is None:
            return TransportError("the write leaves the receiver's region", retryable=False)
        try:
            with revocation_table.locked_for_write(peer.table_fd, peer.epochs, epoch, touched, stop) as allowed:
                if not allowed:
                    return TransportError(f"no open window of epoch {epoch} covers the write", retryable=False)
                for piece in pieces:
                    if piece.source.nbytes:
                        # numpy's copy, unlike memoryview's, releases the GIL.
                        source = np.frombuffer(piece.source, np.uint8)
                        np.copyto(peer.region[piece.offset : piece.offset + source.size], source)
        except OSError as error:
            return TransportError(f"the receiver's revocation table cannot be locked: {error}")
        return None

    def _finish(self, error: TransportError) -> None:
        self._loop.call(self._release)
        self._on_end(self._handle, self)
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
