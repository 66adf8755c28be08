"""Log lines about peers that are refused: one a minute, because strangers can cause them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

REPORT_S = 60.0


class Refusals:
    """The lines of one server or port. For one thread.

    Args:
        name: The server, for the text: "the bootstrap server".
        what: What it refuses: "a connection" or "a request".
        clock: Monotonic seconds.
    """

    def __init__(self, name: str, what: str = "a connection", clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._what, self._clock = name, what, clock
        self._reported_at, self._unreported = -math.inf, 0

    def report(self, address: str, why: str) -> None:
        """Logs that a peer was refused, or counts it for the next line."""
        now = self._clock()
        if now - self._reported_at < REPORT_S:
            self._unreported += 1
            return
        more = f" ({self._unreported} more since the last such line)" if self._unreported else ""
        log.warning("%s refused %s of %s: %s%s", self._name, self._what, address, why, more)
        self._reported_at, self._unreported = now, 0
