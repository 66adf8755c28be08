"""Queue of transfers to process: those with new events and those whose timer has expired.

A manager with a thousand transfers processes the few that need it, not all of them on every turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

MAX_STALE = 64
"""Stale timers that may be kept beyond one for each item: a timer of a minute would keep a forgotten item that long."""


class ReadyQueue(Generic[Item]):
    """Items with new events, and one timer for each item. Not thread-safe. Times are those of the state machines."""

    def __init__(self) -> None:
        self._touched: dict[Item, None] = {}  # in the order of their first event
        self._times: dict[Item, float] = {}
        self._heap: list[tuple[float, int, Item]] = []  # stale entries, absent from _times, are skipped
        self._serial = count()

    def touch(self, item: Item) -> None:
        """The item has a new event."""
        self._touched[item] = None

    def untouch(self, item: Item) -> None:
        """The events of the item so far are handled."""
        self._touched.pop(item, None)

    def schedule(self, item: Item, time: float) -> None:
        """Sets the timer of the item, replacing the last one."""
        if self._times.get(item) != time:
            self._times[item] = time
            heapq.heappush(self._heap, (time, next(self._serial), item))
            self._drop_stale()

    def is_due(self, item: Item, now: float) -> bool:
        """Returns whether the timer of the item has expired, or there is none."""
        time = self._times.get(item)
        return time is None or time <= now

    def forget(self, item: Item) -> None:
        """Removes the item and its timer."""
        self._touched.pop(item, None)
        self._times.pop(item, None)
        self._drop_stale()

    def due(self, now: float) -> list[Item]:
        """Removes and returns the items to process now, with their expired timers. Schedule them again afterwards."""
        while (time := self.next()) is not None and time <= now:
            item = heapq.heappop(self._heap)[2]
            del self._times[item]
            self._touched[item] = None
        found, self._touched = list(self._touched), {}
        return found

    @property
    def is_clear(self) -> bool:
        """Whether no item has a new event."""
        return not self._touched

    def next(self) -> float | None:
        """Returns when the next timer expires, or None."""
        while self._heap and self._times.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _drop_stale(self) -> None:
        if len(self._heap) > 2 * len(self._times) + MAX_STALE:
            self._heap = [entry for entry in self._heap if self._times.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
