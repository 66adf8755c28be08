"""The region of transports whose own thread receives into it, and the permit checked before each receive.

A byte may be written only while its window is open, so the thread checks the permit before each receive. The receive
itself holds :attr:`ReceiveRegion.lock` and never waits for the network. After closing a window and acquiring the lock
once, it is therefore certain that no later byte is written to that window.
"""

from __future__ import annotations

from threading import Lock

import numpy as np
import numpy.typing as npt

from .contract import Receiving, Region, Revoked, Window
from .outbox import Outbox
from .windows import BlockRows, Windows


class ReceiveRegion:
    """The windows and bytes of a region, and the lock that every receive holds.

    Args:
        region: The registered region.
        outbox: Takes a ``Revoked`` event for each revocation.
    """

    def __init__(self, region: Region, outbox: Outbox) -> None:
        self._outbox = outbox
        self.windows = Windows(BlockRows(region.rows, region.num_blocks), np.zeros(region.num_blocks, np.uint64))
        self.view = region.view
        self.lock = Lock()

    def admit(self, window: Window) -> None:
        self.windows.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self.windows.close_blocks(epoch, blocks)
        self._settle()

    def revoke(self, epoch: int) -> None:
        self.windows.revoke(epoch)
        self._settle()
        self._outbox.post(Revoked(epoch))

    def receiving(self, epoch: int) -> None:
        """Reports that bytes are coming in under an epoch."""
        self._outbox.post(Receiving(epoch))

    def close(self) -> None:
        """Closes every window for good. No byte is written once it returns."""
        self.windows.close_all()
        self._settle()
        self.view = memoryview(b"")  # the memory is free when its owner closes it

    def _settle(self) -> None:
        """Returns when every receive that began before the call has ended: at most one system call later."""
        with self.lock:
            pass


class Permit:
    """Permission for one write, checked with :attr:`ReceiveRegion.lock` held. Once refused, it stays refused.

    Args:
        windows: The open windows.
        epoch: The epoch of the write.
        touched: The blocks that it touches; None: it leaves its field.
    """

    def __init__(self, windows: Windows, epoch: int, touched: npt.NDArray[np.intp] | None) -> None:
        self.refused = touched is None
        self._windows, self._epoch, self._touched = windows, epoch, touched
        self._version = -1  # version of the windows at the last check

    def holds(self) -> bool:
        """Returns whether the write is still allowed."""
        version = self._windows.version  # read first: a window closed during the check raises the version
        if version != self._version and self._touched is not None and not self.refused:
            self._version = version
            self.refused = not self._windows.allows(self._epoch, self._touched)
        return not self.refused
