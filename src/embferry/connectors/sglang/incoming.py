"""One part of a request on its way to a language server: a transfer that outlives its encoder."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

from embferry import (
    Aborted,
    EmbeddingReceiver,
    EmbeddingTransferError,
    GatherSink,
    IntegrityError,
    KVPoll,
    LayoutMismatch,
    LocalProtocolError,
    ReceiveManager,
)

from ..shared.counters import Counters
from ..shared.managers import Managers
from ..shared.shape import Shape, digest_of
from ..shared.shared_rows import ByteRows, SharedRows
from ..shared.transfer_trace import TransferTrace
from .parts import Content, PartId, Source
from .request_trace import RequestTrace

log = logging.getLogger(__name__)

CURRENT_CONTENTS = 8
"""Contents of encoders that are remembered for one part, at most."""

AGAIN_S = 0.2
"""Time until an encoder that has aborted a transfer is asked again."""


class IncomingPart:
    """A part that a rank receives for its host. The thread of the scheduler calls the methods.

    Threads of the library move the bytes, whether or not :meth:`poll` is called.

    Args:
        rid: SGLang's id of the request.
        host: Number of the host among those of the language server.
        ranks: Ranks of the host, which map the memory.
        managers: The receive managers.
        counters: The metrics.
        failover_timeout: How long the transfer waits for another encoder, in seconds.
        trace: The trace of the request, if it has spans.

    Attributes:
        source: Where the part comes from now; None before the dispatcher has said so.
        shared: The memory of the embedding, once its length is known.
        is_complete: Whether the embedding is here, complete and verified.
    """

    def __init__(
        self,
        rid: str,
        host: int,
        ranks: int,
        managers: Managers[ReceiveManager],
        counters: Counters,
        failover_timeout: float,
        trace: RequestTrace | None = None,
    ) -> None:
        self.source: Source | None = None
        self.shared: SharedRows | None = None
        self._rid, self._host, self._ranks = rid, host, ranks
        self._managers, self._counters, self._failover_timeout = managers, counters, failover_timeout
        self._request_trace = trace
        self._trace: TransferTrace | None = None  # of the transfer that runs
        self._lock = threading.Lock()  # guards "shared" and the reported loss against the callback thread
        self._receiver: EmbeddingReceiver | None = None
        self._contents: list[Content] = []
        self._began = time.monotonic()
        self._is_closed = False
        self.is_complete = False
        self._reported_loss: EmbeddingTransferError | None = None
        self._ask_again_at: float | None = None
        self._verified: tuple[EmbeddingReceiver, str] | None = None  # a complete transfer, and the digest of its rows

    @property
    def part(self) -> PartId | None:
        """The name of the part as the current encoder has it."""
        return None if self.source is None else self.source.part_of(self._rid)

    @property
    def before(self) -> Content | None:
        """Content of the latest encoder that has sent it."""
        return self._contents[-1] if self._contents else None

    def comes_from(self, source: Source) -> bool:
        """Starts the transfer, or continues it with another encoder.

        Returns:
            Whether the part is still needed. It may be complete already when its encoder is lost.

        Raises:
            EmbeddingTransferError: The source cannot be used.
        """
        if self._is_closed or (self.source is not None and source.attempt <= self.source.attempt):
            return False
        if self.source is not None and source.info.kind != self.source.info.kind:
            why = f"the encoder at {source.url} makes {source.info.kind}, the one before {self.source.info.kind}"
            raise LayoutMismatch(why)
        first, self.source = self.source is None, source
        if first:
            self._open(source)
            return True
        if self._receiver is None:
            return False
        self._counters.add("failovers", label="found")
        if self._receiver.poll() is KVPoll.Success:  # but the message about it was lost with the encoder
            self._end_trace(self._receiver)
            self._receiver.clear()
            self._replace(None)
            self._open(source)
            return True
        room = self._receiver.room
        log.info("room %d: the transfer continues with the encoder at %s", room, source.url, extra={"room": room})
        self._redirect(self._receiver, source)
        return True

    def made(self, content: Content) -> None:
        """Takes note of what the current encoder made."""
        self._contents = [*self._contents, content][-CURRENT_CONTENTS:]

    def poll(self) -> bool:
        """Returns whether the embedding is here, complete and verified.

        Raises:
            EmbeddingTransferError: Why it will not arrive.
        """
        self.ask_again()
        receiver = self._receiver
        if receiver is None:
            return self.is_complete
        error = receiver.failure_exception() if receiver.poll() is KVPoll.Failed else None
        if error is None:
            verified = self._verified
            if verified is None or verified[0] is not receiver or not self._contents:
                return False
            if verified[1] not in {content.digest for content in self._contents}:
                why = "the embedding that arrived is not the one that was encoded; ask again"
                error = IntegrityError(why, room=receiver.room)
        self._receiver = None
        self._count(receiver, "success" if error is None else "failed")
        self._end_trace(receiver, "" if error is None else error.code)
        receiver.clear()
        if error is not None:
            self._counters.add("failures", label=error.code)
            raise error
        self.is_complete = True
        return True

    def ask_again(self) -> None:
        """Asks the current encoder again, a moment after an abort there.

        An encoder that is asked again after it was lost may still have to drop what it was asked before. Its process
        lives, so the dispatcher names no other one.
        """
        if self._ask_again_at is None or time.monotonic() < self._ask_again_at:
            return
        self._ask_again_at = None
        receiver, source = self._receiver, self.source
        if receiver is not None and source is not None and isinstance(receiver.lost, Aborted):
            self._redirect(receiver, source)

    def close(self) -> None:
        """Ends the transfer if it is under way. Arrays of the memory stay valid. Idempotent."""
        with self._lock:
            self._is_closed = True
            shared = self.shared
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self._note_loss(receiver, self._trace)
            receiver.abort()
            self._count(receiver, "aborted")
            self._end_trace(receiver, "aborted")
            receiver.clear()
        if shared is not None:
            shared.close()

    def _open(self, source: Source) -> None:
        manager = self._managers.get(source.info.layout)
        receiver = manager.open(
            source.part_of(self._rid).room(self._host),
            source.info.endpoint,
            GatherSink(make=self._make_rows),
            failover_timeout=self._failover_timeout,
        )
        call = self._request_trace
        self._trace = trace = None if call is None else TransferTrace(call.tracer, call.around)
        receiver.on_change(partial(self._changed, receiver, trace))
        self._receiver = receiver
        receiver.init()

    def _redirect(self, receiver: EmbeddingReceiver, source: Source) -> None:
        self._note_loss(receiver, self._trace)  # before it is forgotten: the callback may come later
        receiver.redirect(source.info.endpoint)

    def _changed(self, receiver: EmbeddingReceiver, trace: TransferTrace | None) -> None:
        """Takes the digest of a complete embedding, and counts a lost encoder.

        Runs on the manager's callback thread without locks, because a digest takes its time.
        """
        if receiver is not self._receiver:
            return  # the embedding is fetched again
        is_complete = receiver.poll() is KVPoll.Success
        if trace is not None:
            trace.changed(receiver, is_complete=is_complete)
        if is_complete and (self._verified is None or self._verified[0] is not receiver):
            try:
                rows = receiver.arrays()["input_embeddings"]
            except LocalProtocolError:
                return  # cleared meanwhile, by the scheduler's thread
            self._verified = (receiver, digest_of(rows, self._shape(len(rows))).hex())
        if self._note_loss(receiver, trace):
            self._ask_again_at = time.monotonic() + AGAIN_S

    def _note_loss(self, receiver: EmbeddingReceiver, trace: TransferTrace | None) -> bool:
        """Counts and logs that the encoder is lost, once for each loss. Any thread.

        Returns:
            Whether the encoder has just aborted the transfer: then it may live, and may be asked again.
        """
        with self._lock:
            lost = receiver.lost
            if lost is None or lost is self._reported_loss:
                return False
            self._reported_loss = lost
        self._counters.add("losses", label=lost.code)
        if trace is not None:
            trace.lost(lost.code)
        log.warning("room %d: the encoder is lost: %s", receiver.room, lost, extra={"room": receiver.room})
        return isinstance(lost, Aborted)

    def _make_rows(self, tokens: int) -> dict[str, ByteRows]:
        """Allocates the memory. Runs on the manager's callback thread with the sink's lock held."""
        with self._lock:
            if self._is_closed:
                return {}  # the sink refuses it; the transfer has been aborted
            if self.shared is None or self.shared.shape.tokens != tokens:
                self._replace(SharedRows.make(self._shape(tokens), self._ranks))
            assert self.shared is not None
            return {"input_embeddings": self.shared.rows}

    def _replace(self, shared: SharedRows | None) -> None:
        """Takes other memory, and gives up the descriptor of the last one."""
        last, self.shared = self.shared, shared
        if last is not None:
            last.close()

    def _shape(self, tokens: int) -> Shape:
        assert self.source is not None
        return Shape(tokens, self.source.info.width, self.source.info.dtype)

    def _end_trace(self, receiver: EmbeddingReceiver, error: str = "") -> None:
        if self._trace is not None:
            self._trace.end(receiver, self._shape(1).token_bytes, error)

    def _count(self, receiver: EmbeddingReceiver, outcome: str) -> None:
        self._counters.add("transfers", label=outcome)
        self._counters.add("resumed_transfers", max(0, receiver.transfers - 1))
        received, tokens = receiver.verified_tokens, receiver.total_embedding_length
        token_bytes = self._shape(1).token_bytes
        self._counters.add("wire_bytes", received * token_bytes)
        if outcome == "success":
            self._counters.add("tokens", tokens)
            self._counters.add("embedding_bytes", tokens * token_bytes)
            self._counters.add("repeated_bytes", max(0, received - tokens) * token_bytes)
            self._counters.observe_seconds(time.monotonic() - self._began)
