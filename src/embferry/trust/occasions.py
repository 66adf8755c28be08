"""Log lines about what clients can cause without limit: one a minute of each kind, with a count of the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

REPORT_S = 60.0
MAX_KINDS = 64
_OTHERS = ""


class Occasions:
    """The events of one place in the code, by kind. For one thread.

    Args:
        clock: Monotonic seconds.
        most: Kinds that have a line a minute of their own; any others share one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = MAX_KINDS) -> None:
        self._clock, self._most = clock, most
        self._kinds: dict[str, tuple[float, int]] = {}  # when the last line was due, and the events since then

    def count(self, kind: str) -> int | None:
        """Counts an event.

        Args:
            kind: The code of an error, for example.

        Returns:
            The number of events since the last line, if a line is due; None otherwise.
        """
        now = self._clock()
        kind = self._bounded(kind, now)
        reported_at, unreported = self._kinds.get(kind, (-math.inf, 0))
        if now - reported_at < REPORT_S:
            self._kinds[kind] = reported_at, unreported + 1
            return None
        self._kinds[kind] = now, 0
        return unreported

    def _bounded(self, kind: str, now: float) -> str:
        """Returns the kind, or that of all others if there are too many. Kinds whose minute is over make room."""
        if kind not in self._kinds and len(self._kinds) >= self._most:
            self._kinds = {known: its for known, its in self._kinds.items() if now - its[0] < REPORT_S}
        return kind if kind in self._kinds or len(self._kinds) < self._most else _OTHERS


def more(count: int) -> str:
    """Returns the end of a line, in words."""
    return f" ({count:,} more since the last such line)" if count else ""
