"""The span of one transfer to an engine: how long it took, how often it was resumed, and how much it moved."""

from __future__ import annotations

import time

from embferry import EmbeddingReceiver
from embferry.traces.context import TraceContext
from embferry.traces.spans import Tracer


class TransferTrace:
    """The span ``transfer``, from now on. One thread at a time calls each method; nothing changes after the end.

    Args:
        tracer: Makes the span.
        call: The span of the request that needs the embedding.
    """

    def __init__(self, tracer: Tracer, call: TraceContext) -> None:
        self._span = tracer.begin("transfer", call)
        self._transfers = 1
        self._has_tokens = False
        self._complete_at: float | None = None

    def changed(self, receiver: EmbeddingReceiver, *, is_complete: bool) -> None:
        """Notes what has arrived. Runs on a manager's callback thread; the engine may see it later."""
        if receiver.verified_tokens > 0 and not self._has_tokens:
            self._has_tokens = True
            self._span.event("first_tokens")
        self._note_resumes(receiver.transfers, None)
        if is_complete:
            self._complete_at = time.monotonic()

    def lost(self, code: str) -> None:
        """Notes that the producer is lost, or the engine's own manager. Another one may continue."""
        self._span.event("lost", code=code)

    def end(self, receiver: EmbeddingReceiver | None, token_bytes: int, error: str = "") -> None:
        """Ends the span, unless it has ended.

        Args:
            receiver: What has received; None if nothing does any more.
            token_bytes: Bytes of each token.
            error: A word for what went wrong; empty if nothing did.
        """
        if receiver is not None:
            self._note_resumes(receiver.transfers, self._complete_at)
            tokens, resumed = receiver.verified_tokens, max(0, receiver.transfers - 1)
            self._span.set(tokens=tokens, bytes=tokens * token_bytes, transport=receiver.transport, resumed=resumed)
        self._span.end(error, self._complete_at)

    def _note_resumes(self, transfers: int, at: float | None) -> None:
        """Adds an event if more transfers have begun than were seen: one is initial, every further one resumed."""
        if transfers > self._transfers:
            self._transfers = transfers
            self._span.event("resumed", at, transfer=transfers)
