"""Files that are read again when they have changed, so that a key or a certificate is replaced without a restart."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from embferry.protocol.errors import EmbferryError

log = logging.getLogger(__name__)

REPORT_S = 60.0
"""Between two log lines about files that cannot be used any more."""

T = TypeVar("T")
_Stamp = tuple[tuple[int, ...], ...]


class Reread(Generic[T]):
    """The value of files as they are now. Any thread.

    Files that cannot be used any more leave the last value in use, and are logged once a minute.

    Args:
        name: The value, for the log: "the cluster keys".
        paths: The files.
        read: Reads them. Raises an :class:`EmbferryError` that names the file if one cannot be used.
        clock: Monotonic seconds.

    Raises:
        EmbferryError: From ``read``.
    """

    def __init__(
        self, name: str, paths: tuple[Path, ...], read: Callable[[], T], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._paths, self._read, self.clock = name, paths, read, clock
        self._reported_at = -math.inf
        # Taken before the files are read: what is written meanwhile is seen the next time.
        self._stamp = _stamp(paths)
        self._value = read()

    def value(self) -> T:
        """Returns the value, after the files were read again if they have changed.

        Several threads may do so at once; the attributes are replaced whole.
        """
        stamp = _stamp(self._paths)
        if stamp != self._stamp:
            try:
                self._value = self._read()
            except EmbferryError as error:
                self._report(error)
            else:
                self._stamp = stamp
                log.info("process %d has read %s again", os.getpid(), self._name)
        return self._value

    def _report(self, error: EmbferryError) -> None:
        now = self.clock()
        if now - self._reported_at >= REPORT_S:
            self._reported_at = now
            log.error("%s read last stay in use: %s", self._name, error.detail)


def _stamp(paths: tuple[Path, ...]) -> _Stamp | None:
    """Returns what differs when a file has changed; None if one is not there."""
    try:
        found = [os.stat(path) for path in paths]
    except OSError:
        return None
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_mode) for s in found)
