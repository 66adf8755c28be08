"""Who is inside: how a receiver takes back blocks that an engine of another process writes one-sidedly.

The engine has no gate. It writes where it is told as long as the address is registered when the write *begins*, and
goes on to write whatever happens then. So the promise that no late write changes a byte is kept here:

- A sender **enters** before each write. It is let in when its window is open, and it is told the address of the
  current *alias* of the region (:mod:`alias`); otherwise it is refused, before a byte lands.
- It **leaves** when its engine has ended the write. *Clean* means that every part was acknowledged by the receiving
  engine, which does so after the last byte is in memory: nothing of it can land later. A write that failed may
  have left bytes in buffers on the way; it stays inside, *dirty*. So do all writes of a sender whose connection broke.
- To **revoke**, the window is shut, and the writers inside under that epoch are told to begin nothing more. When the
  last has left clean, the promise holds. If one is dirty, or has not left within the grace period (it is stopped, or
  its network is gone, or it lies), the alias is **replaced**: the old one is cut off from the region, a new one is
  registered. From then on nothing that was inside, in whatever epoch, can change a byte.
- ``close_blocks`` cannot wait, and need not: who has said that it is done has left. If one is inside after all, dirty
  or not, the alias is replaced at once.

Replacing it fails the writes of others that were under way through the old alias, visibly: their senders see them
fail and retry those chunks, through the new one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embferry.protocol.errors import LocalProtocolError

from ...contract import Region, Revoked, Window
from ...outbox import Outbox
from ...windows import BlockRows, Windows
from .alias import Alias
from .engine import Engine


@dataclass(eq=False, slots=True)
class Stay:
    """One write of one sender, from its entry on."""

    sender: object
    epoch: int
    touched: npt.NDArray[np.intp]
    dirty: bool = False


class Access:
    """The windows of a region, who is inside them, and the alias they write through. Thread-safe.

    :param engine: its to close, with the region cut off.
    :param stop: tells the ``sender`` of a stay to begin nothing more under that epoch; must not block.
    :param later: calls :meth:`expire` with the epoch after the grace period.
    :raises OSError: the region cannot be mapped again.
    :raises TransportError: the engine cannot register it.
    """

    def __init__(
        self,
        region: Region,
        engine: Engine,
        outbox: Outbox,
        stop: Callable[[object, int], None],
        later: Callable[[int], None],
    ) -> None:
        if region.fd is None:
            raise LocalProtocolError(
                "the mooncake transport needs memory it can map twice: MultimodalDataBuffers(..., shared=True)"
            )
        self._engine, self._outbox, self._stop, self._later = engine, outbox, stop, later
        self.rows = BlockRows(region.rows, region.num_blocks)
        self._windows = Windows(self.rows, np.zeros(region.num_blocks, np.uint64))
        self._lock = threading.RLock()
        self._inside: set[Stay] = set()
        self._revoking: list[int] = []
        self._severed: list[Alias] = []
        self._fd = os.dup(region.fd)
        self._size = region.view.nbytes
        try:
            self._alias = Alias(self._fd, self._size, populate=True)
            engine.register(self._alias.address, self._size)
        except BaseException:
            os.close(self._fd)
            raise
        self.replacements = 0
        self._closed = False

    # The receiver's driver

    def admit(self, window: Window) -> None:
        with self._lock:
            if any(stay.epoch != window.epoch and np.isin(stay.touched, window.blocks).any() for stay in self._inside):
                raise LocalProtocolError(
                    f"a writer is still in blocks of the window of epoch {window.epoch}; await Revoked of its epoch"
                )
            self._windows.admit(window)

    def close_blocks(self, epoch: int, blocks: Sequence[int]) -> None:
        """:raises OSError, TransportError: somebody was inside, and the region could not be mapped anew."""
        with self._lock:
            self._windows.close_blocks(epoch, blocks)
            if any(np.isin(stay.touched, blocks).any() for stay in self._of(epoch)):
                self._replace()

    def revoke(self, epoch: int) -> None:
        """:raises OSError, TransportError: as :meth:`close_blocks`."""
        with self._lock:
            self._windows.revoke(epoch)
            self._revoking.append(epoch)
            waiting = self._of(epoch)
            for sender in {stay.sender for stay in waiting}:
                self._stop(sender, epoch)
            if waiting:
                self._later(epoch)
            self._settle()

    def close(self) -> None:
        """Cuts the region off and ends the engine; pending revocations are answered. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._windows.close_all()
            self._alias.sever()
            self._inside.clear()
        self._engine.close()  # outside the lock: it waits for its threads
        with self._lock:
            self._settle()
            for alias in (*self._severed, self._alias):
                alias.release()
            os.close(self._fd)

    # The senders

    def enter(self, sender: object, epoch: int, blocks: npt.NDArray[np.intp]) -> tuple[Stay, int] | None:
        """The stay and where the region begins now, or None: no open window covers ``blocks``."""
        with self._lock:
            if self._closed or not self._windows.allows(epoch, blocks):
                return None
            stay = Stay(sender, epoch, blocks)
            self._inside.add(stay)
            return stay, self._alias.address

    def leave(self, stay: Stay, *, clean: bool) -> bool:
        """Ends a stay; whether its window is still open."""
        with self._lock:
            if clean:
                self._inside.discard(stay)
            stay.dirty = not clean
            self._settle()
            return self._windows.allows(stay.epoch, stay.touched)

    def expire(self, epoch: int) -> None:
        """The grace period of a revocation of ``epoch`` is over."""
        with self._lock:
            if epoch in self._revoking and not self._closed:
                self._replace()
                self._settle()

    def _of(self, epoch: int) -> list[Stay]:
        return [stay for stay in self._inside if stay.epoch == epoch]

    def _settle(self) -> None:
        """Answers the revocations whose promise holds; makes it hold where a writer has left dirty."""
        if any(stay.dirty for epoch in self._revoking for stay in self._of(epoch)):
            self._replace()
        waiting = [epoch for epoch in self._revoking if self._of(epoch)]
        done = [epoch for epoch in self._revoking if epoch not in waiting]
        self._revoking = waiting
        for epoch in done:
            self._outbox.post(Revoked(epoch))

    def _replace(self) -> None:
        """Cuts everybody off who is inside: no new write through the old alias, then no byte, then the new one."""
        self._engine.unregister(self._alias.address)
        self._alias.sever()
        for sender, epoch in {(stay.sender, stay.epoch) for stay in self._inside}:
            self._stop(sender, epoch)  # it would fail, slice by slice
        self._inside.clear()
        self._severed.append(self._alias)
        self._alias = Alias(self._fd, self._size, populate=False)
        self._engine.register(self._alias.address, self._size)
        self.replacements += 1
