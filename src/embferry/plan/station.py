"""A queue with one server: the front end of an instance, or a vision encoder."""

from __future__ import annotations

from collections import deque

from .clock import Clock, Then


class Station:
    """Does one piece of work after the other, in the order in which they come.

    Attributes:
        busy: Seconds in which it worked, longer ones where cores were full included.
        waiting: Pieces of work that have not ended.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queue: deque[tuple[float, Then]] = deque()
        self.busy = 0.0
        self.waiting = 0

    def add(self, seconds: float, then: Then) -> None:
        """Does the work after all that came before, then calls."""
        self.waiting += 1
        self._queue.append((seconds, then))
        if self.waiting == 1:
            self._next()

    def _next(self) -> None:
        seconds, then = self._queue.popleft()
        began = self._clock.now

        def ended() -> None:
            self.busy += self._clock.now - began
            self.waiting -= 1
            if self._queue:
                self._next()
            then()

        self._clock.work(seconds, ended)
