"""A function that blocks until the test says otherwise, for tests of what happens meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

DEADLINE = 60.0
"""Seconds after which a wait fails the test."""
LARGE = 60 << 20
"""Bytes of a large body."""


class Blocking:
    """Replaces a function; each call waits until ``release`` is set.

    Attributes:
        calls: the calls so far.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.called, self.release = threading.Event(), threading.Event()
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        with self._lock:
            self.calls += 1
        self.called.set()
        assert self.release.wait(DEADLINE)
        return self._function(*arguments)
