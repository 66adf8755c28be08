"""Log lines about peers that are refused: one a minute for each reason, because strangers can cause them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from .occasions import Occasions, more

log = logging.getLogger(__name__)

MAX_REASONS = 8
"""Reasons that have a line a minute of their own; any others share one."""


class Refusals:
    """The lines of one server or port. For one thread.

    Args:
        name: The server, for the text: "the bootstrap server".
        what: What it refuses: "a connection" or "a request".
        clock: Monotonic seconds.
    """

    def __init__(self, name: str, what: str = "a connection", clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._what = name, what
        self._reasons = Occasions(clock, MAX_REASONS)

    def report(self, address: str, why: str) -> None:
        """Logs that a peer was refused, or counts it for the next line with this reason."""
        if (count := self._reasons.count(why)) is not None:
            log.warning("%s refused %s of %s: %s%s", self._name, self._what, address, why, more(count))
