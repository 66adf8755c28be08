"""The ``shm`` transport: one copy, straight from the source tensor into the receiver's blocks. One host, one user.

The receiver's handle names its region, its revocation table and a pipe that hangs up when the receiver closes
(:mod:`peer`). Senders map the region and copy into it themselves; :mod:`revocation_table` explains why that is safe.
Nothing has a name in the file system, so nothing is left behind when a process is killed.

Threads: the loop watches the pipe and the process of each peer and repeats probes for revocations that wait for a
writer; a sender has ``copy_threads`` that copy.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.protocol.layout import merged

from ..contract import Capabilities, Event, Piece, Region, Revoked, Transport, Window, Written
from ..handles import decode_handle
from ..net.loop import Loop
from ..outbox import Outbox
from ..windows import BlockRows, Windows
from . import revocation_table
from .peer import ShmHandle, boot_id, open_peer, shared_file, start_time
from .send_link import SendLink

__all__ = ["ShmTransport"]

PROBE_S = 0.002


class ShmTransport(Transport):
    """A transport over shared memory.

    Args:
        wake: Called on any thread when :meth:`poll` has events.
        copy_threads: Number of writes that are copied at the same time; one thread fills a memory channel.
        close_timeout_s: Seconds that :meth:`close` waits for writers of other processes to leave the region.
    """

    name = "shm"
    capabilities = Capabilities(same_host_only=True, maps_region=True)

    def __init__(
        self, wake: Callable[[], None] = lambda: None, *, copy_threads: int = 2, close_timeout_s: float = 5.0
    ) -> None:
        super().__init__(wake)
        self._close_timeout_s = close_timeout_s
        self._outbox = Outbox(lambda: self.wake())
        self._loop = Loop("embferry-shm", self._outbox.fail)
        self._workers = ThreadPoolExecutor(copy_threads, thread_name_prefix="embferry-shm-copy")
        self._receiver: _Receiver | None = None
        self._links: dict[bytes, SendLink] = {}
        self._lock = threading.Lock()  # guards _links, which other threads change too
        self._closed = False

    def register(self, region: Region) -> bytes:
        if self._receiver is not None or self._closed:
            raise LocalProtocolError("one region a transport; make another transport for another region")
        if region.fd is None:
            raise LocalProtocolError("the shm transport needs shared memory: MultimodalDataBuffers(..., shared=True)")
        try:
            self._receiver = receiver = _Receiver(region, self._loop, self._outbox)
            handle = ShmHandle(
                boot_id(),
                os.getpid(),
                start_time(os.getpid()),
                shared_file(region.fd),
                shared_file(receiver.table_fd),
                shared_file(receiver.life[0]),
                region.num_blocks,
                region.rows,
            )
        except OSError as error:
            raise TransportError(f"shared memory cannot be set up: {error}", retryable=False) from error
        return msgspec.msgpack.encode(handle)

    def admit(self, window: Window) -> None:
        self._registered().admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self._registered().windows.close_blocks(epoch, blocks)

    def revoke(self, epoch: int) -> None:
        self._registered().revoke(epoch)

    def connect(self, handle: bytes) -> None:
        decoded = decode_handle(handle, ShmHandle, self.name)
        with self._lock:
            if self._closed:
                raise LocalProtocolError("this transport is closed")
            if handle not in self._links:
                self._links[handle] = SendLink(handle, open_peer(decoded), self._loop, self._outbox, self._forget)

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            link = self._links.get(handle)
            if link is not None:
                link.write(self._workers, epoch, pieces, ticket)
                return
        self._outbox.post(Written(ticket, TransportError("there is no link to this receiver; connect first")))

    def disconnect(self, handle: bytes) -> None:
        with self._lock:
            link = self._links.pop(handle, None)
        if link is not None:
            link.end(TransportError("this end disconnected"), lost=False)

    def poll(self) -> list[Event]:
        return self._outbox.drain()

    def close(self) -> None:
        """Ends all links and the region.

        Raises:
            TransportError: A stopped writer of another process may still continue its copy. Everything is closed, but
                the region must not be used again.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._links.values())
        for link in links:
            link.end(TransportError("this end was closed"), lost=False)
        self._workers.shutdown(wait=True)
        empty = self._receiver is None or self._receiver.close(self._close_timeout_s)
        self._loop.close()
        if not empty:
            raise TransportError(
                f"a stopped writer has not left the region within {self._close_timeout_s} s; give the region up",
                retryable=False,
            )

    def _forget(self, handle: bytes, link: SendLink) -> None:
        with self._lock:
            if self._links.get(handle) is link:
                del self._links[handle]

    def _registered(self) -> _Receiver:
        if self._receiver is None:
            raise LocalProtocolError("no region is registered with this transport; call register first")
        return self._receiver


@dataclass(slots=True)
class _Revocation:
    """A revocation under way; ``runs`` (first block, count) may still have a writer."""

    epoch: int
    runs: list[tuple[int, int]]


class _Receiver:
    """The receiving end of the transport."""

    def __init__(self, region: Region, loop: Loop, outbox: Outbox) -> None:
        self._loop, self._outbox = loop, outbox
        self.num_blocks = region.num_blocks
        self.life = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.table_fd, epochs = revocation_table.create(region.num_blocks)
        self.windows = Windows(BlockRows(region.rows, region.num_blocks), epochs)
        self._lock = threading.Lock()  # guards _revocations
        self._revocations: list[_Revocation] = []
        self._probing = False

    def admit(self, window: Window) -> None:
        with self._lock:
            pending = {
                b for revocation in self._revocations for first, n in revocation.runs for b in range(first, first + n)
            }
        if pending & set(window.blocks):
            raise LocalProtocolError(
                f"blocks of the window of epoch {window.epoch} are being revoked; wait for Revoked"
            )
        self.windows.admit(window)

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
        while (
            not (empty := revocation_table.has_no_writers(self.table_fd, 0, self.num_blocks))
            and time.monotonic() < deadline
        ):
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
