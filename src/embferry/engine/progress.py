"""Lines about a step that takes long, such as loading weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

LINE_SECONDS = 3.0
"""Between two lines. What ends sooner has none."""


class Progress:
    """Counts the parts of a step, and logs from time to time how many are done.

    Args:
        what: the parts.
        total: their number.
        clock: monotonic seconds.
    """

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._done = self._nbytes = 0
        self._told = clock()

    def step(self, nbytes: int) -> None:
        """Counts a part of this many bytes as done."""
        self._done += 1
        self._nbytes += nbytes
        if self._clock() >= self._told + LINE_SECONDS:
            self._told = self._clock()
            log.info("loaded %d of %d %s, %.1f GB", self._done, self._total, self._what, self._nbytes / 1e9)
