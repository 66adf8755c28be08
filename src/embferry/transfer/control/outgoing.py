"""Frames on their way to one peer, bounded in bytes."""

from __future__ import annotations

import itertools
from collections import deque

BUFFERS = 64  # frames in one system call
CALL_BYTES = 1 << 20


class Budget:
    """Bytes that many share.

    Attributes:
        used: Bytes taken.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class Outgoing:
    """A queue of encoded frames. It outlives a connection, so that the next one sends what this one has not.

    Args:
        limit: Most bytes queued here.
        budget: What all queues together may hold.

    Attributes:
        bytes: Bytes queued, without those of the first frame that were sent.
    """

    def __init__(self, limit: int, budget: Budget) -> None:
        self.bytes = 0
        self._limit, self._budget = limit, budget
        self._frames: deque[bytes] = deque()
        self._sent = 0  # bytes of the first frame

    def __bool__(self) -> bool:
        return bool(self._frames)

    def add(self, frame: bytes) -> bool:
        """Queues a frame. Returns False if there is no room for it."""
        size = len(frame)
        if self.bytes + size > self._limit or self._budget.used + size > self._budget.limit:
            return False
        self._frames.append(frame)
        self.bytes += size
        self._budget.used += size
        return True

    def buffers(self) -> list[memoryview | bytes]:
        """Returns what the next system call should send."""
        chosen: list[memoryview | bytes] = []
        total = 0
        for frame in itertools.islice(self._frames, BUFFERS):
            chosen.append(frame if chosen or not self._sent else memoryview(frame)[self._sent :])
            total += len(frame)
            if total >= CALL_BYTES:
                break
        return chosen

    def advance(self, count: int) -> None:
        """Removes ``count`` bytes that the kernel has taken."""
        self._count(-count)
        self._sent += count
        while self._frames and self._sent >= len(self._frames[0]):
            self._sent -= len(self._frames.popleft())

    def rewind(self) -> None:
        """Begins the first frame again, for another connection."""
        self._count(self._sent)
        self._sent = 0

    def clear(self) -> int:
        """Drops everything. Returns how many frames that were."""
        count = len(self._frames)
        self._count(-self.bytes)
        self._frames.clear()
        self._sent = 0
        return count

    def _count(self, count: int) -> None:
        self.bytes += count
        self._budget.used += count
