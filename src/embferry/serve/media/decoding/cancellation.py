"""Work that may be cancelled from another thread, while it waits or runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class CancelledWorkError(Exception):
    """The work is not wanted any more: its client has gone, or its room was aborted."""


class Cancellation:
    """The cancellation of one piece of work. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Callable[[], object]] = []
        self._is_set = False

    @property
    def is_set(self) -> bool:
        return self._is_set

    def cancel(self) -> None:
        """Calls what is registered. Idempotent."""
        with self._lock:
            self._is_set = True
            calls, self._calls = self._calls, []
            for call in calls:
                call()

    @contextlib.contextmanager
    def calling(self, call: Callable[[], object]) -> Iterator[None]:
        """Has ``call`` called by :meth:`cancel` while the context lasts, and not after it. It must not block.

        Raises:
            CancelledWorkError: the work is cancelled already.
        """
        with self._lock:
            if self._is_set:
                raise CancelledWorkError
            self._calls.append(call)
        try:
            yield
        finally:
            with self._lock:
                if call in self._calls:
                    self._calls.remove(call)
