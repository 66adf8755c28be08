"""The source memory that is registered with a sender's engine."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Registry(Protocol):
    """An engine that memory is registered with."""

    def register(self, address: int, length: int) -> Any:
        """Returns what :meth:`deregister` takes.

        Raises:
            TransportError: The engine does not take the memory.
        """

    def deregister(self, registered: Any) -> None: ...


@dataclass(slots=True)
class _Entry:
    length: int
    registered: Any
    users: int


class Sources:
    """Registrations, counted by the writes that use them.

    Registered ranges never overlap: Mooncake refuses that, and NIXL does not find memory behind a range that lies
    inside another.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._starts: list[int] = []
        self._entries: dict[int, _Entry] = {}

    def acquire(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Registers what is not yet registered.

        Args:
            ranges: Address and length, disjoint.

        Returns:
            False, with nothing done, while a range overlaps a registered one without being the same.

        Raises:
            TransportError: The engine does not take the memory. Nothing stays acquired.
        """
        if any(self._overlaps(start, length) for start, length in ranges):
            return False
        acquired: list[tuple[int, int]] = []
        try:
            for start, length in ranges:
                if start not in self._entries:
                    # One by one, because a list is deregistered only as it was registered.
                    self._entries[start] = _Entry(length, self._registry.register(start, length), 0)
                    insort(self._starts, start)
                self._entries[start].users += 1
                acquired.append((start, length))
        except BaseException:
            self.release(acquired)
            raise
        return True

    def release(self, ranges: Sequence[tuple[int, int]]) -> None:
        for start, _ in ranges:
            entry = self._entries[start]
            entry.users -= 1
            if entry.users == 0:
                del self._entries[start]
                self._starts.remove(start)
                self._registry.deregister(entry.registered)

    def _overlaps(self, start: int, length: int) -> bool:
        """Returns whether a registered range overlaps this one and is another."""
        at = bisect_right(self._starts, start)
        if at < len(self._starts) and self._starts[at] < start + length:
            return True
        if at == 0:
            return False
        before = self._starts[at - 1]
        end = before + self._entries[before].length
        return end > start and (before, end) != (start, start + length)
