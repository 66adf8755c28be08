"""Log lines about peers that are refused: one a minute for each reason, because strangers can cause them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

REPORT_S = 60.0
MAX_REASONS = 8
"""Reasons that have a line a minute of their own; any others share one."""
_OTHERS = ""


class Refusals:
    """The lines of one server or port. For one thread.

    Args:
        name: The server, for the text: "the bootstrap server".
        what: What it refuses: "a connection" or "a request".
        clock: Monotonic seconds.
    """

    def __init__(self, name: str, what: str = "a connection", clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._what, self._clock = name, what, clock
        self._reasons: dict[str, _Reason] = {}

    def report(self, address: str, why: str) -> None:
        """Logs that a peer was refused, or counts it for the next line with this reason."""
        now = self._clock()
        reason = self._reason(why, now)
        if now - reason.reported_at < REPORT_S:
            reason.unreported += 1
            return
        more = f" ({reason.unreported} more since the last such line)" if reason.unreported else ""
        log.warning("%s refused %s of %s: %s%s", self._name, self._what, address, why, more)
        reason.reported_at, reason.unreported = now, 0

    def _reason(self, why: str, now: float) -> _Reason:
        if why not in self._reasons and len(self._reasons) >= MAX_REASONS:
            for known in [one for one, its in self._reasons.items() if now - its.reported_at >= REPORT_S]:
                del self._reasons[known]
        key = why if why in self._reasons or len(self._reasons) < MAX_REASONS else _OTHERS
        return self._reasons.setdefault(key, _Reason())


class _Reason:
    def __init__(self) -> None:
        self.reported_at, self.unreported = -math.inf, 0
