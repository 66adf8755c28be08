"""What a producer has promised and nobody has fetched yet: within a budget, and each embedding once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from embferry.protocol.errors import CapacityError

from .shelf import Kept

Name = tuple[str, bytes]
"""Hash and digest: encoded again, an embedding may differ in its last bits, and is another one."""


class Offers:
    """Any thread. What is promised is never dropped: it ends when the last room that it was promised in has ended."""

    def __init__(self, budget: int, ended: Callable[[Kept], None]) -> None:
        self._budget, self._ended = budget, ended
        self._open: dict[Name, tuple[Kept, set[int]]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, mm_hash: str) -> Kept | None:
        with self._lock:
            return next((kept for (known, _), (kept, _) in self._open.items() if known == mm_hash), None)

    def begin(self, kept: Kept, room: int) -> Kept:
        """Answers the one to read from: of the same bytes, the first that was promised.

        :raises CapacityError: it is not promised yet, and does not fit beside what is.
        """
        name = (kept.item.mm_hash, kept.item.digest)
        with self._lock:
            known, rooms = self._open.get(name, (kept, set()))
            if not rooms:
                if self._bytes + kept.nbytes > self._budget:
                    why = f"{self._bytes} bytes are promised and not fetched, of {self._budget}"
                    raise CapacityError(f"{why}: ask another producer, ask later, or raise offered_bytes")
                self._open[name] = (known, rooms)
                self._bytes += kept.nbytes
            rooms.add(room)
            return known

    def end(self, kept: Kept, room: int) -> None:
        """The room has ended: fetched, given up by its consumer, or too late. Repeating it does no harm."""
        name = (kept.item.mm_hash, kept.item.digest)
        with self._lock:
            known, rooms = self._open.get(name, (kept, set()))
            if room not in rooms:
                return
            rooms.remove(room)
            if rooms:
                return
            del self._open[name]
            self._bytes -= known.nbytes
        self._ended(known)

    @property
    def nbytes(self) -> int:
        return self._bytes
