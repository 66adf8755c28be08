"""A time-out on a loop that is set again far more often than it expires."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..net.loop import Loop


class Timeout:
    """Calls ``on_expiry`` on the loop's thread, once, at the time that was set last.

    Setting it again moves a number; the loop gets a new timer only for an earlier time. For the loop's thread only.
    """

    def __init__(self, loop: Loop, on_expiry: Callable[[], None]) -> None:
        self._loop, self._on_expiry = loop, on_expiry
        self._at = math.inf
        self._timer_at = math.inf  # the loop's earliest outstanding timer

    def set(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds
        if self._at < self._timer_at:
            self._timer_at = self._at
            self._loop.later(max(0.0, seconds), self._check)

    def clear(self) -> None:
        self._at = math.inf

    def _check(self) -> None:
        now = time.monotonic()
        if now < self._timer_at:
            return  # a timer that an earlier one has replaced
        self._timer_at = math.inf
        if now >= self._at:
            self._at = math.inf
            self._on_expiry()
        elif self._at < math.inf:
            self.set(self._at - now)
