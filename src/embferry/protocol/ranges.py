"""Sets of tokens, as half-open ranges ``[start, stop)``."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class RangeSet:
    """Disjoint, ascending, never adjacent ranges. Adding in order, the common case, is constant time."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable, like a set

    def __repr__(self) -> str:
        return f"RangeSet({', '.join(f'[{a}, {b})' for a, b in self)})"

    @property
    def size(self) -> int:
        """Tokens in the set."""
        return sum(self._stops) - sum(self._starts)

    @property
    def prefix(self) -> int:
        """Number of tokens from token 0 on without a gap."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0

    def add(self, start: int, stop: int) -> int:
        """Adds a range, merging it with ranges that overlap or touch it. Returns how many of its tokens were new."""
        _check(start, stop)
        if start == stop:
            return 0
        low = bisect_left(self._stops, start)  # the first range that ends at or after start
        high = bisect_right(self._starts, stop)  # past the last that begins at or before stop
        had = sum(b - a for a, b in self._slice(low, high))
        if low < high:
            start = min(start, self._starts[low])
            stop = max(stop, self._stops[high - 1])
        self._starts[low:high] = [start]
        self._stops[low:high] = [stop]
        return stop - start - had

    def discard(self, start: int, stop: int) -> None:
        """Removes a range."""
        _check(start, stop)
        if start == stop:
            return
        low = bisect_right(self._stops, start)  # the first range that ends after start
        high = bisect_left(self._starts, stop)  # past the last that begins before stop
        touched = self._slice(low, high)
        kept = [piece for a, b in touched for piece in ((a, min(b, start)), (max(a, stop), b)) if piece[0] < piece[1]]
        self._starts[low:high] = [a for a, _ in kept]
        self._stops[low:high] = [b for _, b in kept]

    def covers(self, start: int, stop: int) -> bool:
        """Returns whether every token of the range is in the set. The empty range is covered."""
        if start >= stop:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and self._stops[at] >= stop

    def overlaps(self, start: int, stop: int) -> bool:
        """Returns whether any token of the range is in the set."""
        at = bisect_right(self._stops, start)
        return at < len(self._starts) and self._starts[at] < stop and start < stop

    def _slice(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        return zip(self._starts[low:high], self._stops[low:high], strict=True)


def _check(start: int, stop: int) -> None:
    if not 0 <= start <= stop:
        raise ValueError(f"[{start}, {stop}) is not a range")
