"""The source memory that is registered with an agent."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .agent import Agent


@dataclass(slots=True)
class _Entry:
    length: int
    registered: Any
    users: int


class Sources:
    """Registrations, counted by their users, never overlapping: NIXL finds memory by walking a sorted list, and goes
    past a range that lies inside another."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._starts: list[int] = []
        self._entries: dict[int, _Entry] = {}

    def acquire(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Registers what is not yet registered. False, and nothing done, while a range overlaps with another in part.

        :raises TransportError: the engine does not take the memory.
        """
        if any(self._overlaps(start, length) for start, length in ranges):
            return False
        for start, length in ranges:
            if start not in self._entries:
                # One by one: a list is deregistered only as it was registered.
                self._entries[start] = _Entry(length, self._agent.register([(start, length)]), 0)
                insort(self._starts, start)
            self._entries[start].users += 1
        return True

    def release(self, ranges: Sequence[tuple[int, int]]) -> None:
        for start, _ in ranges:
            entry = self._entries[start]
            entry.users -= 1
            if entry.users == 0:
                self._agent.deregister(entry.registered)
                del self._entries[start]
                self._starts.remove(start)

    def _overlaps(self, start: int, length: int) -> bool:
        """With a registered range other than exactly this one."""
        at = bisect_right(self._starts, start)
        if at < len(self._starts) and self._starts[at] < start + length:
            return True
        if at == 0:
            return False
        before = self._starts[at - 1]
        end = before + self._entries[before].length
        return end > start and (before, end) != (start, start + length)
