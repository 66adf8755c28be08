"""A position in a list of buffers that a socket fills or drains in order, part by part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

IOV_MAX = 1024  # buffers the kernel takes in one call (UIO_MAXIOV of linux/uio.h)
CALL_BYTES = 8 << 20  # bytes in one call: enough to amortise it, few enough to give other connections a turn


class Cursor:
    """Bytes ``[start, stop)`` of the concatenation of ``views``; ``stop`` None means the end."""

    def __init__(self, views: Sequence[memoryview], start: int = 0, stop: int | None = None) -> None:
        self._views: list[memoryview] = []
        before = 0
        for view in views:
            last = view.nbytes if stop is None else max(0, stop - before)
            part = view[max(0, start - before) : last]
            before += view.nbytes
            if part.nbytes:
                self._views.append(part)
        self._at = 0
        self.left = sum(view.nbytes for view in self._views)

    def views(self) -> list[memoryview]:
        """Returns the next buffers, as many as one system call takes."""
        chosen, total = [], 0
        for view in itertools.islice(self._views, self._at, self._at + IOV_MAX):
            if total + view.nbytes > CALL_BYTES:
                chosen.append(view[: CALL_BYTES - total])
                break
            chosen.append(view)
            total += view.nbytes
        return chosen

    def prepend(self, view: memoryview) -> None:
        """Puts a buffer before those that are left."""
        self._views.insert(self._at, view)
        self.left += view.nbytes

    def advance(self, count: int) -> None:
        self.left -= count
        while count:
            view = self._views[self._at]
            if count < view.nbytes:
                self._views[self._at] = view[count:]
                return
            count -= view.nbytes
            self._at += 1

    def release(self) -> None:
        """Drops the references to all buffers."""
        self._views, self._at, self.left = [], 0, 0
