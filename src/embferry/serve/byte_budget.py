"""A bound on the bytes that the requests of a process hold together."""

from __future__ import annotations

import threading
from types import TracebackType

from embferry.serve.errors import ServeError


class ByteBudget:
    """Counts the bytes that requests hold, and refuses what goes beyond the limit. Thread-safe.

    A request that is alone is not refused, however large it is: waiting would not help it.

    Args:
        limit: bytes.
        setting: the name of the setting, for errors.
    """

    def __init__(self, limit: int, setting: str) -> None:
        self.limit = limit
        self._setting = setting
        self._lock = threading.Lock()
        self._held = 0

    @property
    def held(self) -> int:
        """The bytes that all requests hold now."""
        return self._held

    def hold(self, nbytes: int = 0) -> Hold:
        """Returns the share of a new request. :meth:`Hold.release` must follow.

        Raises:
            ServeError: capacity_exhausted.
        """
        hold = Hold(self)
        hold.set(nbytes)
        return hold

    def _resize(self, old: int, new: int) -> None:
        with self._lock:
            others = self._held - old
            if new > old and others > 0 and others + new > self.limit:
                why = f"other requests hold {others:,} bytes and this one needs {new:,}; at most {self.limit:,} fit"
                raise ServeError(
                    "capacity_exhausted", f"{why} ({self._setting}); try again later", status=503, retryable=True
                )
            self._held = others + new


class Hold:
    """The share of one request. A context manager, which releases it."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._released = False
        self.nbytes = 0

    def set(self, nbytes: int) -> None:
        """Changes the share to ``nbytes``. Does nothing once it is released.

        Raises:
            ServeError: capacity_exhausted, if it grows and the others leave no room; it is unchanged then.
        """
        with self._lock:
            if not self._released:
                self._budget._resize(self.nbytes, nbytes)
                self.nbytes = nbytes

    def add(self, nbytes: int) -> None:
        """Adds to the share; see :meth:`set`."""
        with self._lock:
            if not self._released:
                self._budget._resize(self.nbytes, self.nbytes + nbytes)
                self.nbytes += nbytes

    def release(self) -> None:
        """Gives the share back. Idempotent."""
        with self._lock:
            self._budget._resize(self.nbytes, 0)
            self.nbytes, self._released = 0, True

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
