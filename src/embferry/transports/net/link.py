"""Base of the links over sockets, each of whose writes is reported once, before the end of the link."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from embferry.protocol.errors import TransportError, shown

from ..contract import Piece, Written
from ..outbox import Outbox
from ..windows import Ranges, checked_ranges
from .loop import Scope

OnEnd = Callable[[Any, Iterable[int], TransportError, bool], None]
"""Called once when a link has ended, with it, the tickets of its writes in flight, the error, and whether it was lost.

It reports all of them. See ``LinkedTransport``.
"""


class SocketLink(ABC):
    """The link to one receiver. The constructor and ``write`` are for any thread.

    Its callbacks run in a scope of its own: a bug in one of them ends this link only.

    Attributes:
        scope: The link's part of the loop.
    """

    def __init__(self, loop: Scope, outbox: Outbox, on_end: OnEnd) -> None:
        self.scope = loop.scope(self._failed)
        self._outbox, self._on_end = outbox, on_end
        self._lock = threading.Lock()
        self._error: TransportError | None = None  # set once, with the lock; no write enters afterwards

    @property
    def has_ended(self) -> bool:
        return self._error is not None

    def write(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        ranges = checked_ranges(epoch, pieces)
        with self._lock:
            error = ranges if isinstance(ranges, TransportError) else self._error
            if error is None and not isinstance(ranges, TransportError):
                start = self._enter(epoch, ranges, pieces, ticket)
        if error is None:
            start()
        else:
            self._outbox.post(Written(ticket, error))

    @abstractmethod
    def _enter(self, epoch: int, ranges: Ranges, pieces: Sequence[Piece], ticket: int) -> Callable[[], None]:
        """Takes in a write, with the lock held. Returns a function that starts it, to be called without the lock."""

    @abstractmethod
    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends every write in flight, and the connection. ``lost`` is False if this side ends the link."""

    def _failed(self, error: BaseException) -> None:
        """A callback of the link has raised. Runs on the loop's thread; the scope has ended."""
        self.end(TransportError(f"this end failed to handle the connection: {shown(error)}"), lost=True)


def refused() -> TransportError:
    return TransportError("the receiver has no open window that covers the write", retryable=False)
