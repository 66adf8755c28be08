"""Times that are kept by the second: pure."""

from __future__ import annotations


class Second:
    """The samples of one second.

    Attributes:
        second: its number.
        changed: the version of the journal at the last change.
    """

    __slots__ = ("_count", "_highest", "_lowest", "_total", "changed", "second")

    def __init__(self, second: int) -> None:
        self.second, self.changed = second, -1
        self._count, self._total, self._lowest, self._highest = 0, 0.0, 0.0, 0.0

    def add(self, value: float, version: int) -> None:
        """Adds a time in seconds."""
        self._lowest = value if not self._count else min(self._lowest, value)
        self._highest = max(self._highest, value)
        self._count, self._total, self.changed = self._count + 1, self._total + value, version

    def view(self) -> tuple[float | None, ...]:
        """Returns the number of the second, the count of samples, their sum, the least and the greatest."""
        return self.second, self._count, rounded(self._total), rounded(self._lowest), rounded(self._highest)


def rounded(seconds: float | None) -> float | None:
    """Returns a time as JSON has it."""
    return None if seconds is None else round(seconds, 4)
