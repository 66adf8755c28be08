"""Time limits of many things, all equally long: one timer serves them."""

from __future__ import annotations

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
