"""The link of a language instance, which all transfers to it share."""

from __future__ import annotations

import heapq
import itertools

from .clock import Clock, Then


class Link:
    """Transfers that arrive at one instance, each at the same rate: the link's, divided by their number.

    Senders do not wait for each other: each has a connection of its own, and connections share a link about evenly.
    The virtual time is that of :mod:`.clock`, of a link in place of cores.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._virtual = self._since = 0.0
        self._transfers: list[tuple[float, int, Then]] = []
        self._numbers = itertools.count()
        self._latest = 0
        """Number of the timer that counts; earlier ones are out of date."""

    def add(self, seconds: float, then: Then) -> None:
        """Calls after a transfer that would take so many seconds alone."""
        self._advance()
        heapq.heappush(self._transfers, (self._virtual + seconds, next(self._numbers), then))
        self._wait()

    def _advance(self) -> None:
        now = self._clock.now
        if self._transfers:
            self._virtual += (now - self._since) / len(self._transfers)
        self._since = now

    def _wait(self) -> None:
        """Sets the timer for the end of the transfer with the least bytes left."""
        self._latest = number = self._latest + 1
        left = max(0.0, self._transfers[0][0] - self._virtual)
        self._clock.after(left * len(self._transfers), lambda: self._ended(number))

    def _ended(self, number: int) -> None:
        if number != self._latest:
            return
        self._virtual, _, then = heapq.heappop(self._transfers)
        self._since = self._clock.now
        if self._transfers:
            self._wait()
        then()
