"""Who has something to do: those to whom something has happened, and those whose time has come.

A manager with a thousand transfers looks at the few that need it, not at all of them at every turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class ReadyQueue(Generic[Item]):
    """Not thread-safe. Times are those of the machines."""

    def __init__(self) -> None:
        self._touched: dict[Item, None] = {}  # in the order in which it happened
        self._times: dict[Item, float] = {}
        self._heap: list[tuple[float, int, Item]] = []  # entries that are not in _times any more are passed over
        self._serial = count()

    def touch(self, item: Item) -> None:
        """Something has happened to it."""
        self._touched[item] = None

    def schedule(self, item: Item, time: float) -> None:
        """Its next time, instead of any other."""
        if self._times.get(item) != time:
            self._times[item] = time
            heapq.heappush(self._heap, (time, next(self._serial), item))

    def forget(self, item: Item) -> None:
        """It is over."""
        self._touched.pop(item, None)
        self._times.pop(item, None)

    def due(self, now: float) -> list[Item]:
        """Those to look at now. Each is taken off: schedule it again."""
        while (time := self.next()) is not None and time <= now:
            item = heapq.heappop(self._heap)[2]
            del self._times[item]
            self._touched[item] = None
        found, self._touched = list(self._touched), {}
        return found

    @property
    def is_clear(self) -> bool:
        """Whether nothing has happened to anybody since they were looked at."""
        return not self._touched

    def next(self) -> float | None:
        """When the next one's time comes, or None."""
        while self._heap and self._times.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
