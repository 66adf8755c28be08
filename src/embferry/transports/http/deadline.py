"""A time-out on a loop that is moved and cleared far more often than it strikes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..net.loop import Loop


class Deadline:
    """Calls ``struck`` on the loop's thread when the time set last has come. Setting it again costs no timer."""

    def __init__(self, loop: Loop, struck: Callable[[], None]) -> None:
        self._loop, self._struck = loop, struck
        self._at = math.inf
        self._next = math.inf  # when the earliest outstanding timer strikes

    def set(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds
        if self._at < self._next:
            self._arm()

    def clear(self) -> None:
        self._at = math.inf

    def _arm(self) -> None:
        self._next = self._at
        self._loop.later(max(0.0, self._at - time.monotonic()), self._check)

    def _check(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return  # an earlier timer than this one has been set since, and has armed the next
        self._next = math.inf
        if now >= self._at:
            self._at = math.inf
            self._struck()
        elif self._at < math.inf:
            self._arm()
