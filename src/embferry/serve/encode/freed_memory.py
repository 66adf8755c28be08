"""Returns freed memory to the system.

glibc keeps what a thread has freed, for its next calls: blocks of up to 32 MiB, so also whole frames of a video. Each
thread that decodes could keep gigabytes, which nothing counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import traceback
from collections.abc import Callable, Iterator

LEAST_BYTES = 64 << 20
"""Freed bytes after which memory is returned: every process keeps some, and returning it takes milliseconds."""


def trim() -> None:
    """Returns all free memory of the process, where the C library can: glibc."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory:
    """Counts the bytes that requests free, and returns them to the system once they are many. Thread-safe."""

    def __init__(self, trim: Callable[[], object] = trim) -> None:
        self._trim = trim
        self._lock = threading.Lock()
        self._freed = 0

    def add(self, nbytes: int) -> None:
        """Counts bytes that have been freed."""
        with self._lock:
            self._freed += nbytes

    @contextlib.contextmanager
    def counting(self, grow: Callable[[int], object]) -> Iterator[Callable[[int], None]]:
        """Yields a function that calls ``grow``, and counts at the end what it was called with."""
        taken = 0

        def grow_counted(nbytes: int) -> None:
            nonlocal taken
            grow(nbytes)
            taken += nbytes

        try:
            yield grow_counted
        finally:
            self.add(taken)

    def give_back(self) -> None:
        """Returns memory, if there is much of it. Blocks for milliseconds."""
        with self._lock:
            if self._freed < LEAST_BYTES:
                return
            self._freed = 0
        self._trim()


@contextlib.contextmanager
def dropping_locals() -> Iterator[None]:
    """Has an error of the block keep nothing alive that its functions held, such as decoded frames."""
    try:
        yield
    except BaseException as error:
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__cause__ or seen.__context__
        raise
