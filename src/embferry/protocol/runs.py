"""The blocks of a grant, as runs of adjacent ones, kept in 16 bytes a run. No run is ever expanded as a whole."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from operator import add, le

Run = tuple[int, int]
"""The first block, and the number of blocks."""


class Runs:
    """Runs of blocks in the order in which tokens fill them.

    Args:
        runs: The runs, none of them empty.

    Attributes:
        blocks: The number of blocks.
    """

    __slots__ = ("_ends", "_firsts", "blocks")

    def __init__(self, runs: tuple[Run, ...] = ()) -> None:
        self._firsts = array("Q", (first for first, _ in runs))
        self._ends = array("Q", accumulate(count for _, count in runs))  # blocks up to the end of each run
        self.blocks = self._ends[-1] if runs else 0

    def __len__(self) -> int:
        return len(self._firsts)

    def between(self, start: int, stop: int) -> tuple[int, ...]:
        """Returns the ``start``-th block up to the one before the ``stop``-th."""
        return tuple(self._between(start, min(stop, self.blocks)))

    def _between(self, start: int, stop: int) -> Iterator[int]:
        at = bisect_right(self._ends, start)
        while start < stop:
            end = min(stop, self._ends[at])
            first = self._firsts[at] + start - (self._ends[at - 1] if at else 0)
            yield from range(first, first + end - start)
            start, at = end, at + 1


def are_distinct(runs: tuple[Run, ...], num_blocks: int) -> bool:
    """Returns whether no block is in two runs, and every block is below ``num_blocks``."""
    firsts, counts = zip(*runs, strict=True)
    stops = list(map(add, firsts, counts))
    if max(stops) > num_blocks:
        return False
    if all(map(le, stops, firsts[1:])):  # ascending, the common case
        return True
    # Ranges are disjoint if and only if as many have ended as have begun before, wherever another one begins.
    return all(map(le, sorted(stops), sorted(firsts)[1:]))
