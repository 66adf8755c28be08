"""A store whose calls a test decides."""

from __future__ import annotations

from collections.abc import Callable

from embferry.cache.contract import Accept
from embferry.cache.entry import Entry


class Stubborn:
    """A store that has nothing, and whose calls do what a test wants."""

    def __init__(self, read: Callable[[], None] = lambda: None, write: Callable[[], None] = lambda: None) -> None:
        self._read, self._write = read, write
        self.asked: list[str] = []
        self.written: list[str] = []
        self.is_closed = False

    def read(self, key: str, accept: Accept) -> Entry | None:
        self.asked.append(key)
        self._read()
        return None

    def write(self, entry: Entry, data: memoryview) -> int:
        self._write()
        self.written.append(entry.key)
        return entry.nbytes

    def close(self) -> None:
        self.is_closed = True


def refuse(code: int) -> Callable[[], None]:
    def call() -> None:
        raise OSError(code, "no")

    return call
