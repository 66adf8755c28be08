"""The last events of one end, for the log of a bug. Recording one formats nothing and keeps no message."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from .messages import (
    Abort,
    Body,
    Confirm,
    Drain,
    Drained,
    Grant,
    Offer,
    Open,
    Pending,
    Progress,
    Unknown,
    WriteFailed,
    Written,
)

KEPT = 64
"""Events that are kept."""

Event = tuple[str, str, object, float | int]
"""Kind (received, sent or called), name of the message or the call, key numbers, and the time or the peer's session."""


def _epochs(body: Any) -> tuple[int, ...]:
    return (*body.epochs[:1], len(body.epochs))


def _chunks(body: Any) -> tuple[int, ...]:
    return body.epoch, body.chunks[0].offset, len(body.chunks)


KEYS: dict[type, Callable[[Any], object]] = {
    Open: attrgetter("generation", "transferred_tokens"),
    Grant: attrgetter("epoch", "sent_tokens", "allocated_tokens", "floor"),
    Progress: attrgetter("transferred_tokens", "floor"),
    Drain: _epochs,
    Confirm: attrgetter("transferred_tokens"),
    Offer: attrgetter("generation", "total_tokens", "transport"),
    Pending: attrgetter("epoch"),
    Written: _chunks,
    WriteFailed: attrgetter("epoch", "offset", "length", "code"),
    Drained: _epochs,
    Unknown: attrgetter("missing"),
    Abort: attrgetter("generation", "code"),
}
"""By message: its numbers that matter. A message without an entry has none."""


class History:
    """The last :data:`KEPT` events of one end."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)

    def __len__(self) -> int:
        return len(self._events)

    def received(self, body: Body, now: float) -> None:
        """Records a message from the peer."""
        kind = type(body)
        key = KEYS.get(kind)
        self._events.append(("received", kind.__name__, key(body) if key else (), now))

    def sent(self, body: Body, target: int) -> None:
        """Records a message to the peer's session ``target``."""
        kind = type(body)
        key = KEYS.get(kind)
        self._events.append(("sent", kind.__name__, key(body) if key else (), target))

    def called(self, name: str, *numbers: object) -> None:
        """Records a call of the driver or the user."""
        self._events.append(("called", name, numbers, 0))

    def lines(self) -> list[str]:
        """Returns one line for each event, oldest first."""
        ends = {"received": " at {:g}", "sent": " to {}", "called": ""}
        return [f"{kind} {name} {key}{ends[kind].format(end)}" for kind, name, key, end in self._events]
