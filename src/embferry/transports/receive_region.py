"""A region that a thread of ours receives into, on transports where it asks before every byte.

A byte may land only while its window is open, so before each receive the thread asks again; the receive itself happens
under :attr:`ReceiveRegion.lock` and never waits for the network. Who has closed a window and then held the lock once
therefore knows that no later byte lands in it.
"""

from __future__ import annotations

from threading import Lock

import numpy as np
import numpy.typing as npt

from .contract import Region, Revoked, Window
from .outbox import Outbox
from .windows import BlockRows, Windows


class ReceiveRegion:
    """Its windows, its bytes, and the lock that a receive holds.

    :param outbox: is told of each revocation.
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

    def close(self) -> None:
        """When it returns, no byte lands any more."""
        self.windows.close_all()
        self._settle()

    def _settle(self) -> None:
        """Returns when no receive is under way that began before the call: at most one call of the kernel later."""
        with self.lock:
            pass


class Permit:
    """Whether one write may land. To be asked under :attr:`ReceiveRegion.lock`; once it is refused, it stays so.

    :param touched: the blocks of the write; None: it leaves its field.
    """

    def __init__(self, windows: Windows, epoch: int, touched: npt.NDArray[np.intp] | None) -> None:
        self.refused = touched is None
        self._windows, self._epoch, self._touched = windows, epoch, touched
        self._version = -1  # of the windows, when they were last seen to allow the write

    def holds(self) -> bool:
        version = self._windows.version  # before looking: what is closed meanwhile has a later one
        if version != self._version and self._touched is not None and not self.refused:
            self._version = version
            self.refused = not self._windows.allows(self._epoch, self._touched)
        return not self.refused
