"""Where a transport's threads put events until the driver polls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from embferry.protocol.errors import LocalProtocolError

from .contract import Event


class Outbox:
    """Events in the order they happened. Any thread posts; ``wake`` is called after each post."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._events: deque[Event] = deque()
        self._failure: BaseException | None = None

    def post(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """A thread of the transport has died of a bug: the next :meth:`drain` raises, so that nobody waits in vain."""
        self._failure = error
        self._wake()

    def drain(self) -> list[Event]:
        if self._failure is not None:
            raise LocalProtocolError(
                f"a thread of the transport ended with {self._failure!r}; report this as a bug"
            ) from self._failure
        # Not list(self._events) and clear(): a post between the two would be lost.
        return [self._events.popleft() for _ in range(len(self._events))]
