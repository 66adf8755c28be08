"""Virtual time, and cores that all work shares evenly.

Work is played by the virtual time of processor sharing (Parekh and Gallager, 1993): every piece of work advances at the
same rate, so the piece with the least work left ends first, however the rate changes meanwhile.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Then = Callable[[], None]


class Clock:
    """Events in their order.

    Args:
        cores: Shared by all work; None: each piece of work has its own.
        load: Cores that one piece of work fills.
    """

    def __init__(self, cores: float | None = None, load: float = 1.0) -> None:
        self.now = 0.0
        self._cores, self._load = cores, load
        self._virtual = 0.0
        self._timers: list[tuple[float, int, Then]] = []
        self._work: list[tuple[float, int, Then]] = []
        self._numbers = itertools.count()

    def at(self, time: float, then: Then) -> None:
        """Calls at a time; at once if it has passed."""
        heapq.heappush(self._timers, (max(time, self.now), next(self._numbers), then))

    def after(self, seconds: float, then: Then) -> None:
        """Calls after a delay that needs no core."""
        self.at(self.now + seconds, then)

    def work(self, seconds: float, then: Then) -> None:
        """Calls after so many seconds of work, which take longer while the cores are full."""
        heapq.heappush(self._work, (self._virtual + seconds, next(self._numbers), then))

    def run(self) -> None:
        """Returns when nothing is left to happen."""
        while self._timers or self._work:
            rate = self._rate()
            work_ends = self.now + (self._work[0][0] - self._virtual) / rate if self._work else float("inf")
            timer_ends = self._timers[0][0] if self._timers else float("inf")
            if timer_ends <= work_ends:
                time, _, then = heapq.heappop(self._timers)
                self._virtual += (time - self.now) * rate
                self.now = max(self.now, time)
            else:
                self._virtual, _, then = heapq.heappop(self._work)
                self.now = max(self.now, work_ends)
            then()

    def _rate(self) -> float:
        """Returns how fast each piece of work advances."""
        wanted = self._load * len(self._work)
        return 1.0 if self._cores is None or wanted <= self._cores else self._cores / wanted
