"""Spans: pure but for the clock and chance. Ended ones go to an exporter, which may be any function.

They hold nothing that clients send: no text, no media, no URL of theirs, no key. A client's ids of its trace are
numbers by then.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Literal

from embferry.protocol.text import printable
from embferry.traces.context import TraceContext

Kind = Literal["internal", "server", "client"]
Value = str | int | float | bool
PREFIX = "embferry."
"""Begins the names of all attributes."""
MAX_EVENTS, MAX_ATTRIBUTES, MAX_TEXT = 128, 32, 200
"""Events and attributes of a span, and characters of a text, that are kept."""
CLOCK_STEP = 100_000_000
"""Nanoseconds by which the system's clock is off before times follow it."""


class Span:
    """Some work of one process for one request. Times are monotonic seconds. Nothing changes after its end.

    Attributes:
        name: of the kind of work.
        kind: ``server`` for the work behind a request from outside, ``client`` for a request to another process.
        context: the span's own.
        parent: the context of the span that this one is a part of; None for the root of a trace.
        attributes: facts.
        events: time, name and facts of each; beyond ``MAX_EVENTS``, none are kept.
        error: the code of the error that ended the work; empty if none did.
        ended: the time of its end; None while it lasts.
    """

    __slots__ = (
        "_offset", "_tracer", "attributes", "began", "context", "ended", "error", "events", "kind", "name", "parent",
    )  # fmt: skip

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        kind: Kind,
        context: TraceContext,
        parent: TraceContext | None,
        at: float | None,
    ) -> None:
        self._tracer, self.name, self.kind, self.context, self.parent = tracer, name, kind, context, parent
        self.began = time.monotonic() if at is None else at
        self.ended: float | None = None
        self.attributes: dict[str, Value] = {}
        self.events: list[tuple[float, str, dict[str, Value]]] = []
        self.error = ""
        self._offset = tracer.clock_offset()

    @property
    def times(self) -> tuple[int, int]:
        """Beginning and end in nanoseconds of the epoch."""
        return self.at(self.began), self.at(self.began if self.ended is None else self.ended)

    def at(self, moment: float) -> int:
        """Returns a monotonic time in nanoseconds of the epoch."""
        return self._offset + int(moment * 1e9)

    def begin(self, name: str, kind: Kind = "internal", at: float | None = None) -> Span:
        """Returns a span that is a part of this one. ``at``: when it began; now if None."""
        return self._tracer.begin(name, self.context, kind, at)

    def set(self, **facts: Value) -> None:
        """Sets attributes. Those of this project have the prefix ``embferry.``, which is added here."""
        if self.ended is None:
            for name, value in facts.items():
                if len(self.attributes) < MAX_ATTRIBUTES:
                    self.attributes[PREFIX + name] = _bounded(value)

    def event(self, name: str, at: float | None = None, /, **facts: Value) -> None:
        """Adds an event. ``at``: when it happened; now if None."""
        if self.ended is None and len(self.events) < MAX_EVENTS:
            told = {PREFIX + key: _bounded(value) for key, value in facts.items()}
            self.events.append((time.monotonic() if at is None else at, name, told))

    def end(self, error: str = "", at: float | None = None) -> None:
        """Ends the span, unless it has ended. ``error``: a code. ``at``: when it ended; now if None."""
        if self.ended is None:
            self.ended = max(self.began, time.monotonic() if at is None else at)
            self.error = printable(error, MAX_TEXT)
            self._tracer.ended(self)


class Tracer:
    """Makes spans. Any thread may call the methods.

    Args:
        export: gets each sampled span that has ended, on the thread that ended it. It may not block or raise.
        share: of the traces that begin here, those that are sampled, from 0 to 1.
        close: called at the end of the process; it may block for a second or two.
    """

    def __init__(
        self, export: Callable[[Span], None], share: float = 1.0, close: Callable[[], None] = lambda: None
    ) -> None:
        self._export, self._share, self.close = export, share, close
        self._chance = random.SystemRandom()
        self._offset = _offset()

    def begin(self, name: str, parent: TraceContext | None, kind: Kind = "internal", at: float | None = None) -> Span:
        """Returns a new span.

        Args:
            name: of the kind of work.
            parent: the span that it is a part of; None begins a trace.
            kind: of the span.
            at: when it began; now if None.
        """
        span_id = self._number(64)
        if parent is None:
            context = TraceContext(self._number(128), span_id, self._chance.random() < self._share)
        else:
            context = TraceContext(parent.trace_id, span_id, parent.sampled, parent.state)
        return Span(self, name, kind, context, parent, at)

    def ended(self, span: Span) -> None:
        """Exports a span that has ended, if it is sampled."""
        if span.context.sampled:
            self._export(span)

    def clock_offset(self) -> int:
        """Returns what has to be added to monotonic nanoseconds for those of the epoch.

        It is the same for all spans, so that each lies within the one around it, until the system's clock is set.
        """
        offset = _offset()
        if abs(offset - self._offset) > CLOCK_STEP:
            self._offset = offset
        return self._offset

    def _number(self, bits: int) -> int:
        """Returns a random number, never 0, which is no id."""
        return self._chance.randrange(1, 1 << bits)


def _offset() -> int:
    """Returns the nanoseconds between both clocks. The greatest of three was not interrupted."""
    return max(time.time_ns() - time.monotonic_ns() for _ in range(3))


def _bounded(value: Value) -> Value:
    return printable(value, MAX_TEXT) if isinstance(value, str) else value
