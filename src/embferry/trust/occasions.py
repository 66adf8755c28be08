"""Log lines about what clients can cause without limit: one a minute of each kind, with a count of the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

REPORT_S = 60.0


class Occasions:
    """The events of one place in the code, by kind. For one thread.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # when the last line was due, and the events since then

    def count(self, kind: str) -> int | None:
        """Counts an event.

        Args:
            kind: One of few: the code of an error, for example.

        Returns:
            The number of events since the last line, if a line is due; None otherwise.
        """
        now = self._clock()
        reported_at, unreported = self._kinds.get(kind, (-math.inf, 0))
        if now - reported_at < REPORT_S:
            self._kinds[kind] = reported_at, unreported + 1
            return None
        self._kinds[kind] = now, 0
        return unreported


def more(count: int) -> str:
    """Returns the end of a line, in words."""
    return f" ({count:,} more since the last such line)" if count else ""
