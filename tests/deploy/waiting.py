"""Waiting for a state of processes."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST = 180.0
"""Seconds after which something hangs, however busy the machine is."""


def until(holds: Callable[[], bool]) -> None:
    """Returns when a condition holds. Fails if it does not for very long."""
    deadline = time.monotonic() + LONGEST
    while not holds():
        assert time.monotonic() < deadline, "it does not become true"
        time.sleep(0.2)
