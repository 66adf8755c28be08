"""Source memory, registered with the engine while a write reads from it: what RDMA needs, and TCP does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from embferry.protocol.errors import TransportError

from .engine import Engine


class Sources:
    """Counts who reads from which memory. The engine refuses ranges that overlap without being the same."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readers: Counter[tuple[int, int]] = Counter()

    def take(self, spans: Iterable[tuple[int, int, int]]) -> None:
        """Registers what is not registered yet: all of it, or on an error nothing.

        :raises TransportError: another write reads a range that overlaps one of these; retryable, when that is over."""
        taken: list[tuple[int, int, int]] = []
        try:
            for span in spans:
                source, _, length = span
                if not self._readers[source, length]:
                    self._engine.register(source, length)
                self._readers[source, length] += 1
                taken.append(span)
        except TransportError:
            self.give_back(taken)
            raise

    def give_back(self, spans: Iterable[tuple[int, int, int]]) -> None:
        for source, _, length in spans:
            self._readers[source, length] -= 1
            if not self._readers[source, length]:
                del self._readers[source, length]
                self._engine.unregister(source)

    def move(self, engine: Engine) -> None:
        """Registers all of it with another engine; the one before has ended.

        :raises TransportError: that engine refuses."""
        self._engine = engine
        for (source, length), readers in self._readers.items():
            if readers:
                engine.register(source, length)
