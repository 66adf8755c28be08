"""The span of one transfer to an engine: how long it took, how often it was resumed, and how much it moved."""

from __future__ import annotations

import time

from embferry.traces.context import TraceContext
from embferry.traces.spans import Tracer


class TransferTrace:
    """Times of a transfer. One thread at a time calls each method.

    Args:
        tracer: Makes the span.
        call: The span of the request that needs the embedding.
    """

    def __init__(self, tracer: Tracer, call: TraceContext) -> None:
        self._span = tracer.begin("transfer", call)
        self._transfers = 1
        self._has_tokens = False
        self._complete_at: float | None = None

    def changed(self, transfers: int, tokens: int) -> None:
        """More tokens have arrived, or another transfer has begun. Runs on a manager's callback thread."""
        if tokens > 0 and not self._has_tokens:
            self._has_tokens = True
            self._span.event("first_tokens")
        if transfers > self._transfers:
            self._transfers = transfers
            self._span.event("resumed", transfer=transfers)

    def complete(self) -> None:
        """All tokens are here. The engine may see it later."""
        self._complete_at = time.monotonic()

    def lost(self, code: str) -> None:
        """The producer is lost; another one may continue."""
        self._span.event("producer_lost", code=code)

    def end(self, outcome: str, *, tokens: int, nbytes: int, transport: str, transfers: int) -> None:
        """Makes the span.

        Args:
            outcome: "success", or the word for another end.
            tokens: Those that have arrived.
            nbytes: Bytes that were received over the transport.
            transport: Its name.
            transfers: How many there were: one initial, every further one resumed.
        """
        if transfers > self._transfers:  # seen at the end only
            self._span.event("resumed", self._complete_at, transfer=transfers)
        self._span.set(tokens=tokens, bytes=nbytes, transport=transport, resumed=max(0, transfers - 1))
        self._span.end("" if outcome == "success" else outcome, self._complete_at)
