"""The span of one transfer to an engine: how long it took, how often it was resumed, and how much it moved."""

from __future__ import annotations

import threading
import time

from embferry import EmbeddingReceiver
from embferry.traces.context import TraceContext
from embferry.traces.spans import Tracer


class TransferTrace:
    """The span ``transfer``, from now on. Any thread may call the methods; nothing changes after the end.

    The callback thread of a manager may see a change after the engine has: even after the end of the transfer. What the
    receiver still knows by then is noted at the end.

    Args:
        tracer: Makes the span.
        call: The span of the request that needs the embedding.
    """

    def __init__(self, tracer: Tracer, call: TraceContext) -> None:
        self._span = tracer.begin("transfer", call)
        self._lock = threading.Lock()  # guards the three below; taken last
        self._transfers = 1
        self._has_tokens = False
        self._complete_at: float | None = None

    def changed(self, receiver: EmbeddingReceiver, *, is_complete: bool) -> None:
        """Notes what has arrived. Runs on a manager's callback thread; the engine may see it earlier or later."""
        with self._lock:
            self._note(receiver, None)
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
        with self._lock:
            if receiver is not None:
                self._note(receiver, self._complete_at)
                tokens, resumed = receiver.verified_tokens, max(0, receiver.transfers - 1)
                self._span.set(tokens=tokens, bytes=tokens * token_bytes, transport=receiver.transport, resumed=resumed)
            self._span.end(error, self._complete_at)

    def _note(self, receiver: EmbeddingReceiver, at: float | None) -> None:
        """Adds an event for the first tokens, and one for transfers that were not seen: all but the first resume it."""
        if receiver.verified_tokens > 0 and not self._has_tokens:
            self._has_tokens = True
            self._span.event("first_tokens", at)
        if (transfers := receiver.transfers) > self._transfers:
            self._transfers = transfers
            self._span.event("resumed", at, transfer=transfers)
