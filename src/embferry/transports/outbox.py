"""The queue of a transport's events until the driver polls them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from embferry.protocol.errors import LocalProtocolError, shown

from .contract import Event


class Outbox:
    """Events in order. Any thread may post.

    Args:
        wake: Called on the posting thread after each post. Must not block.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._events: deque[Event] = deque()
        self._failure: BaseException | None = None

    def post(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Reports that the transport has failed by a bug: the next :meth:`drain` raises, once."""
        self._failure = error
        self._wake()

    def drain(self) -> list[Event]:
        """Removes and returns all events.

        Raises:
            LocalProtocolError: The transport has failed by a bug. It must be closed. The events are not lost.
        """
        if not self._events and self._failure is None:
            return []
        failure, self._failure = self._failure, None
        if failure is not None:
            raise LocalProtocolError(
                f"the transport has failed with {shown(failure)}; report this as a bug"
            ) from failure
        # list(self._events) and clear() would lose an event posted in between.
        return [self._events.popleft() for _ in range(len(self._events))]
