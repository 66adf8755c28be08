"""The spans of one room of an encode worker, made at its end from the times that it has noted."""

from __future__ import annotations

import time

from embferry.engine.media import PreparedItem
from embferry.traces.context import TraceContext
from embferry.traces.spans import Tracer, Value

DELIVERED = "delivered"


class RoomTrace:
    """The times of a room. One thread at a time calls the methods: the rooms' lock is held, or the encoder works on it.

    Args:
        tracer: makes the spans.
        parent: the router's call.
    """

    def __init__(self, tracer: Tracer, parent: TraceContext) -> None:
        self._tracer, self._parent = tracer, parent
        self._began = time.monotonic()
        self._announced = self._encode_began = self._encode_ended = 0.0
        self._items: list[tuple[float, dict[str, Value]]] = []
        self._tokens = self._encoded = 0

    def announced(self, at: float) -> None:
        """The media are decoded; the embedding is announced."""
        self._announced = at

    def item_begins(self) -> None:
        """The next item is looked up, and encoded unless it is found."""
        self._encode_began = self._encode_began or time.monotonic()

    def encodes(self) -> None:
        """The item has to be encoded."""
        self._encoded += 1

    def item_ends(self, item: PreparedItem) -> None:
        """The embedding of the item is there."""
        self._encode_ended = time.monotonic()
        self._tokens += item.num_tokens
        self._items.append((self._encode_ended, {"kind": item.kind, "tokens": item.num_tokens}))

    def end(self, outcome: str, sent_bytes: int) -> None:
        """Makes the spans. The last of them that has begun has the outcome, unless all went well."""
        now = time.monotonic()
        error = "" if outcome == DELIVERED else outcome
        is_sent = self._encode_ended > 0
        encode_end = self._encode_ended or now
        stages: list[tuple[str, float, float, dict[str, Value]]] = []
        stages.append(("prepare", self._began, self._announced or now, {}))
        if self._announced:
            stages.append(("wait", self._announced, self._encode_began or now, {}))
        if self._encode_began:
            facts: dict[str, Value] = {"items": len(self._items), "encoded": self._encoded, "tokens": self._tokens}
            stages.append(("encoder", self._encode_began, encode_end, facts))
        if is_sent:
            stages.append(("send", self._items[0][0], now, {"tokens": self._tokens, "bytes": sent_bytes}))
        for number, (name, began, ended, told) in enumerate(stages, 1):
            span = self._tracer.begin(name, self._parent, at=began)
            span.set(**told)
            for at, item in self._items if name == "encoder" else ():
                span.event("item", at, **item)
            span.end(error if number == len(stages) else "", ended)
