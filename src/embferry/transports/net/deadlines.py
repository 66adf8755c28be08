"""Time-outs that cost the loop few timers: one that is set again and again, and equal ones of many things."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from .loop import Scope

T = TypeVar("T")


class Deadlines(Generic[T]):
    """The items whose time runs, the earliest first. Loop thread only.

    Args:
        loop: Its timers are used.
        seconds: The time of each item.
        on_expiry: Called for each item whose time is over; the item is no longer in here.
    """

    def __init__(self, loop: Scope, seconds: float, on_expiry: Callable[[T], None]) -> None:
        self._loop, self._seconds, self._on_expiry = loop, seconds, on_expiry
        self._began: OrderedDict[T, float] = OrderedDict()
        self._armed = False

    def __contains__(self, item: T) -> bool:
        return item in self._began

    def start(self, item: T) -> None:
        """Gives ``item`` its whole time from now on."""
        self._began[item] = self._loop.now()
        self._began.move_to_end(item)
        self._arm()

    def stop(self, item: T) -> None:
        """Takes ``item`` out, if it is in here."""
        self._began.pop(item, None)

    def earliest(self) -> T | None:
        """Returns the item whose time began first."""
        return next(iter(self._began), None)

    def _arm(self) -> None:
        if not self._armed and self._began:
            self._armed = True
            began = next(iter(self._began.values()))
            self._loop.later(max(0.0, began + self._seconds - self._loop.now()), self._check)

    def _check(self) -> None:
        self._armed = False
        now = self._loop.now()
        try:
            while self._began and next(iter(self._began.values())) + self._seconds <= now:
                self._on_expiry(self._began.popitem(last=False)[0])
        finally:
            self._arm()


class Timeout:
    """A time-out that is set again far more often than it expires.

    It calls ``on_expiry`` once, at the time that was set last. Setting it again moves a number; the loop gets a new
    timer only for an earlier time. For the loop's thread only.

    A time-out that is noticed very late is granted once more: this process was stopped or starved, so what the peer has
    sent meanwhile has not been read.
    """

    def __init__(self, loop: Scope, on_expiry: Callable[[], None]) -> None:
        self._loop, self._on_expiry = loop, on_expiry
        self._at = math.inf
        self._seconds = 0.0
        self._is_repeated = False
        self._timer_at = math.inf  # the loop's earliest outstanding timer

    @property
    def is_set(self) -> bool:
        return self._at < math.inf

    def set(self, seconds: float) -> None:
        self._seconds, self._is_repeated = seconds, False
        self._arm(seconds)

    def _arm(self, seconds: float) -> None:
        self._at = self._loop.now() + seconds
        if self._at < self._timer_at:
            self._timer_at = self._at
            self._loop.later(max(0.0, seconds), self._check)

    def clear(self) -> None:
        self._at = math.inf

    def _check(self) -> None:
        now = self._loop.now()
        if now < self._timer_at:
            return  # a timer that an earlier one has replaced
        self._timer_at = math.inf
        if self._at <= now <= self._at + self._seconds / 2 or (now >= self._at and self._is_repeated):
            self._at = math.inf
            self._on_expiry()
        elif now >= self._at:
            self._is_repeated = True
            self._arm(self._seconds)
        elif self._at < math.inf:
            self._arm(self._at - now)
