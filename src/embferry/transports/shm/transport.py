"""The ``shm`` transport: one copy, straight from the source tensor into the receiver's blocks. One host, one user.

The receiver's handle names its region, its revocation table and a pipe that hangs up when the receiver closes
(:mod:`peer`). Senders map the region and copy into it themselves; :mod:`revocation_table` explains why that is safe.
Nothing has a name in the file system, so nothing is left behind when a process is killed.

Threads: the loop watches the pipe and the process of each peer and repeats probes for revocations that wait for a
writer; a sender has ``copy_threads`` that copy.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np

from embferry.protocol.errors import LocalProtocolError, TransportError, TransportStalled, shown
from embferry.protocol.layout import merged

from ..contract import Capabilities, LinkLost, Piece, Region, Revoked, Window, Written
from ..handles import boot_id, decode_handle
from ..net.connections import LinkedTransport
from ..net.loop import READ, Scope
from ..net.stalls import STALL_TIMEOUT_S, check_stall_timeout
from ..outbox import Outbox
from ..windows import BlockRows, Windows, ranges_of
from . import revocation_table
from .peer import Peer, ShmHandle, open_peer, pid_namespace, shared_file, start_time

log = logging.getLogger(__name__)

PROBE_S = 0.002
INLINE_BYTES = 1 << 20  # up to this size, a copy takes less time than handing it to another thread


class ShmTransport(LinkedTransport["_Receiver", "_Link"]):
    """A transport over shared memory.

    Args:
        wake: Called on any thread when :meth:`poll` has events.
        copy_threads: Number of writes that are copied at the same time; one thread fills a memory channel.
        close_timeout_s: Seconds that :meth:`close` waits for writers of other processes to leave the region.
        stall_timeout_s: Seconds that a copy waits for a receiver that holds the lock of its blocks. Nothing else in a
            copy waits for the receiver.
    """

    name = "shm"
    capabilities = Capabilities(maps_region=True)

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        *,
        copy_threads: int = 2,
        close_timeout_s: float = 5.0,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._stall_timeout_s = check_stall_timeout(stall_timeout_s)
        super().__init__(wake)
        self._close_timeout_s = close_timeout_s
        self._workers = ThreadPoolExecutor(copy_threads, thread_name_prefix="embferry-shm-copy")

    def register(self, region: Region) -> bytes:
        self._check_unregistered()
        if region.fd is None:
            raise LocalProtocolError("the shm transport needs shared memory: MultimodalDataBuffers(..., shared=True)")
        try:
            process = boot_id(), pid_namespace(), os.getpid(), start_time(os.getpid())
            shared = shared_file(region.fd)
            receiver = _Receiver(region, self._loop, self._outbox)
            own = shared_file(receiver.table_fd), shared_file(receiver.life[0])
        except (OSError, MemoryError) as error:
            raise TransportError(f"shared memory cannot be set up: {error!r}", retryable=False) from error
        self._receiving = receiver
        return msgspec.msgpack.encode(ShmHandle(*process, shared, *own, region.num_blocks, region.rows))

    def _connect(self, handle: bytes) -> None:
        decoded = decode_handle(handle, ShmHandle, self.name)
        self._join(handle, lambda: self._make_link(handle, open_peer(decoded)))

    def close(self) -> None:
        """Ends all links and the region.

        Raises:
            TransportError: A stopped writer of another process may still continue its copy. Everything is closed, but
                the region must not be used again.
        """
        super().close()

    def _make_link(self, handle: bytes, peer: Peer) -> _Link:
        try:
            return _Link(handle, peer, self._workers, self._loop, self._outbox, self._stall_timeout_s, self._forget)
        except BaseException:
            peer.close()
            raise

    def _shut(self, links: Sequence[_Link]) -> None:
        for link in links:
            link.end(TransportError("this end was closed"), lost=False)  # a loop that died of a bug has not done it
        for link in links:
            link.over.wait()
        self._workers.shutdown(wait=True)
        if self._receiving is not None and not self._receiving.close(self._close_timeout_s):
            raise TransportError(
                f"a stopped writer has not left the region within {self._close_timeout_s} s; give the region up",
                retryable=False,
            )


@dataclass(slots=True)
class _Revocation:
    """A revocation under way; ``runs`` (first block, count) may still have a writer."""

    epoch: int
    runs: list[tuple[int, int]]


class _Receiver:
    """The receiving end of the transport."""

    def __init__(self, region: Region, loop: Scope, outbox: Outbox) -> None:
        self._loop, self._outbox = loop, outbox
        self.num_blocks = region.num_blocks
        self.life = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.table_fd, epochs = revocation_table.create(region.num_blocks)
        except BaseException:
            for fd in self.life:
                os.close(fd)
            raise
        self.windows = Windows(BlockRows(region.rows, region.num_blocks), epochs)
        self._lock = threading.Lock()  # guards _revocations
        self._revocations: list[_Revocation] = []
        self._probing = False

    def admit(self, window: Window) -> None:
        with self._lock:
            runs = [run for revocation in self._revocations for run in revocation.runs]
        if any(first <= block < first + count for first, count in runs for block in window.blocks):
            raise LocalProtocolError(
                f"blocks of the window of epoch {window.epoch} are being revoked; wait for Revoked"
            )
        self.windows.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self.windows.close_blocks(epoch, blocks)

    def revoke(self, epoch: int) -> None:
        revocation = _Revocation(epoch, list(merged(self.windows.revoke(epoch))))
        with self._lock:
            # A second revoke of the epoch finds nothing open, but must not be reported before the first.
            revocation.runs += [run for other in self._revocations if other.epoch == epoch for run in other.runs]
            self._revocations.append(revocation)
            start, self._probing = not self._probing, True
        if start:
            self._probe()

    def close(self, timeout_s: float) -> bool:
        """Waits until every writer has left the region; returns False if the time was not enough."""
        # Tells the senders, so that they start no other write. The byte is needed because a forked process may keep the
        # pipe open.
        os.write(self.life[1], b"x")
        os.close(self.life[1])
        self.windows.close_all()
        deadline = time.monotonic() + timeout_s
        while not (empty := revocation_table.has_no_writers(self.table_fd, 0, self.num_blocks)):
            if time.monotonic() >= deadline:
                break
            time.sleep(PROBE_S)
        if empty:
            self._probe()
        self._loop.call(self._release)
        return empty

    def _probe(self) -> None:
        """Reports the revocations whose blocks have no writer, and schedules another probe for the others."""
        with self._lock:
            for revocation in self._revocations:
                revocation.runs = [
                    run for run in revocation.runs if not revocation_table.has_no_writers(self.table_fd, *run)
                ]
            done = [revocation.epoch for revocation in self._revocations if not revocation.runs]
            self._revocations = [revocation for revocation in self._revocations if revocation.runs]
            self._probing = again = bool(self._revocations)
        for epoch in done:
            self._outbox.post(Revoked(epoch))
        if again:
            self._loop.call(lambda: self._loop.later(PROBE_S, self._probe))

    def _release(self) -> None:
        with self._lock:
            self._revocations.clear()
        os.close(self.life[0])
        os.close(self.table_fd)


class _Link:
    """Writes to one receiver. The link has ended when :meth:`end` was called and the last copy has ended.

    ``write`` and ``end`` are for any thread.

    Args:
        workers: Copy what is not copied within ``write``; they must not end before the link.
        stall_timeout_s: Longest wait for a lock of the receiver.
        on_end: Called once when the link has ended, on any thread; returns whether a loss of it is reported.

    Attributes:
        over: Set when the link has ended.
        scope: The link's part of the loop.
    """

    def __init__(
        self,
        handle: bytes,
        peer: Peer,
        workers: ThreadPoolExecutor,
        loop: Scope,
        outbox: Outbox,
        stall_timeout_s: float,
        on_end: Callable[[bytes, _Link], bool],
    ) -> None:
        self._handle, self._peer, self._workers = handle, peer, workers
        self._outbox, self._stall_timeout_s, self._on_end = outbox, stall_timeout_s, on_end
        self.over = threading.Event()
        self._lock = threading.Lock()  # guards the attributes below
        self._in_flight = 0
        self._waiting: set[int] = set()  # tickets handed to the workers, and not begun
        self._error: TransportError | None = None
        self._lost = False
        self._stop = threading.Event()
        self.scope = loop.scope(self._failed)
        self.scope.call(self._watch)

    @property
    def has_ended(self) -> bool:
        return self._error is not None

    def write(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            error = self._error
            if error is None:
                self._in_flight += 1
        if error is not None:
            self._outbox.post(Written(ticket, error))
            return
        if sum(piece.source.nbytes for piece in pieces) > INLINE_BYTES or not self._write_inline(epoch, pieces, ticket):
            self._hand_over(epoch, pieces, ticket)

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

    def _hand_over(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            self._waiting.add(ticket)
        try:
            self._workers.submit(self._work, epoch, pieces, ticket)
        except RuntimeError as error:  # no thread can be started; a later one may still take the task
            if self._claim(ticket):
                self._copied(ticket, TransportError(f"the copy could not begin: {error}"))

    def _claim(self, ticket: int) -> bool:
        """Takes a ticket out of the waiting ones. Returns False if another caller has."""
        with self._lock:
            is_mine = ticket in self._waiting
            self._waiting.discard(ticket)
        return is_mine

    def _work(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        if self._claim(ticket):
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
        """Copies the pieces. Returns why it did not; raises nothing but ``Busy``."""
        try:
            return self._copy_locked(epoch, pieces, stop)
        except revocation_table.Busy:
            raise
        except TransportStalled as error:
            return TransportStalled(error.detail)  # without its traceback, whose frames keep the source alive
        except OSError as error:
            return TransportError(f"the receiver's revocation table cannot be locked: {error}")
        except Exception as error:
            log.exception("a copy to shared memory has failed")
            return TransportError(f"the copy failed: {shown(error)}")

    def _copy_locked(self, epoch: int, pieces: Sequence[Piece], stop: threading.Event | None) -> TransportError | None:
        peer = self._peer
        try:
            touched = peer.rows.touched(ranges_of(pieces))
        except OverflowError:
            touched = None
        if touched is None:
            return TransportError("the write leaves the receiver's region", retryable=False)
        own = peer.table_fd, peer.epochs, epoch, touched, stop, self._stall_timeout_s
        with revocation_table.locked_for_write(*own) as allowed:
            if not allowed:
                return TransportError(f"no open window of epoch {epoch} covers the write", retryable=False)
            for piece in pieces:
                if piece.source.nbytes:
                    # numpy's copy, unlike memoryview's, releases the GIL.
                    source = np.frombuffer(piece.source, np.uint8)
                    np.copyto(peer.region[piece.offset : piece.offset + source.size], source)
        return None

    def _finish(self, error: TransportError) -> None:
        self.scope.call(self._release)
        try:
            if self._on_end(self._handle, self) and self._lost:
                self._outbox.post(LinkLost(self._handle, error))
        finally:
            self.over.set()

    def _failed(self, error: BaseException) -> None:
        self.end(TransportError(f"this end failed to watch the receiver: {shown(error)}"), lost=True)

    # On the loop's thread

    def _watch(self) -> None:
        self.scope.watch(self._peer.life_fd, READ, self._on_death)
        self.scope.watch(self._peer.pid_fd, READ, self._on_death)

    def _unwatch(self) -> None:
        self.scope.unwatch(self._peer.life_fd)
        self.scope.unwatch(self._peer.pid_fd)

    def _on_death(self, _: int) -> None:
        self._unwatch()
        self.end(TransportError("the receiver closed its region or died"), lost=True)

    def _release(self) -> None:
        self._unwatch()
        self._peer.close()
