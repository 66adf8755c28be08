"""The blocks of a grant, as runs of adjacent ones, kept in 16 bytes a run. No run is ever expanded as a whole."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import add, le

Run = tuple[int, int]
"""The first block, and the number of blocks."""


class Runs:
    """Runs of blocks in the order in which tokens fill them.

    Args:
        firsts: The first block of each run.
        counts: The number of blocks of each run, at least 1.

    Attributes:
        blocks: The number of blocks.
    """

    __slots__ = ("_ends", "_firsts", "blocks")

    def __init__(self, firsts: Sequence[int] = (), counts: Sequence[int] = ()) -> None:
        self._firsts = array("Q", firsts)
        self._ends = array("Q", accumulate(counts))  # blocks up to the end of each run
        self.blocks = self._ends[-1] if counts else 0

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


def distinct_runs(runs: Sequence[Run], num_blocks: int) -> Runs | None:
    """Returns the runs, or None if a block is in two of them or is not below ``num_blocks``."""
    firsts, counts = zip(*runs, strict=True)
    stops = list(map(add, firsts, counts))
    if max(stops) > num_blocks:
        return None
    # Ranges are disjoint if and only if as many have ended as have begun before, wherever another one begins.
    if all(map(le, stops, firsts[1:])) or all(map(le, sorted(stops), sorted(firsts)[1:])):
        return Runs(firsts, counts)
    return None
