"""One embedding on its way to a consumer: a transfer that outlives its producer, and its own manager.

Threads of the library move the bytes. Nothing here waits for a step of a worker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from embferry import (
    EmbeddingReceiver,
    EmbeddingTransferError,
    GatherSink,
    IntegrityError,
    KVPoll,
    PeerGone,
    ReceiveManager,
    RemoteProtocolError,
)
from embferry.transfer.control.endpoint import check_endpoint
from embferry.transfer.failures import as_transfer_error, attempt

from ..shared.counters import Counters
from ..shared.managers import Managers
from ..shared.shape import digest_of
from ..shared.shared_rows import ByteRows, SharedRows
from ..shared.transfer_trace import TransferTrace
from .claims import new_claim
from .coordinates import Coordinates
from .router_client import RouterClient
from .workers import Workers

log = logging.getLogger(__name__)

ENCODE_S = 600.0
"""How long an embedding may be encoded, at a producer that answers. The router, which wants it, gives up earlier."""


class IncomingEmbedding:
    """One embedding under way to a consumer, or complete. If its producer is lost, it continues with another one.

    The transfer proceeds on threads of the library, whether or not :meth:`poll` is called. The scheduler's thread calls
    the methods.

    Attributes:
        coordinates: Where the embedding comes from; another producer's after a failover.
        rooms: The numbers of the offers that were tried, this one included.
        users: Requests that need the embedding.
        owners: Those of them whose coordinates name this room.
        ready: Whether it is here, complete and verified.
        shared: Its memory, once its length is known.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        managers: Managers[ReceiveManager],
        router: RouterClient | None,
        workers: Workers,
        counters: Counters,
        failed_rooms: frozenset[int],
        on_end: Callable[[], object],
        consumer: str,
        trace: TransferTrace | None = None,
    ) -> None:
        """Starts the transfer, or asks the router for a producer if the coordinates have no endpoint.

        ``consumer`` is the name under which claims are made. From ``failed_rooms`` the same embedding could not be
        obtained. ``on_end`` is called when it is here and mapped, or has failed, on a thread of a manager, of the
        channel or of the router's client. It may not block.
        ``trace`` is its span, if one is wanted.

        Raises:
            PeerGone: The coordinates have no endpoint, and there is no router to ask.
            TransportError: No manager works.
        """
        self.coordinates = coordinates
        self.rooms = failed_rooms | {coordinates.room}
        self.users: set[str] = set()
        self.owners: set[str] = set()
        self.ready = False
        self.shared: SharedRows | None = None
        self._managers, self._workers, self._counters, self._on_end = managers, workers, counters, on_end
        self._router, self._consumer = router if coordinates.failover_token else None, consumer
        self._began = time.monotonic()
        self._trace = trace
        self._digests = {coordinates.digest} - {None}  # those that are right
        # Guards everything below, "shared" and "coordinates" against the callback thread and the router's threads.
        self._lock = threading.RLock()
        self._reported_loss: EmbeddingTransferError | None = None  # the latest that the router was asked about
        self._manager: ReceiveManager | None = None
        self._receiver: EmbeddingReceiver | None = None
        self._asked_because: EmbeddingTransferError | None = None  # while the router is to name a producer
        self._has_restarted = self._has_ended = self._is_closed = False
        self._failure: EmbeddingTransferError | None = None
        if coordinates.endpoint is None:
            self._counters.add("asked_again")
            self._ask_for_endpoint(PeerGone("it was evicted at the consumer", room=coordinates.room))
        else:
            self._open(coordinates.endpoint)
            if coordinates.is_awaited:
                attempt(self._allocate)  # the ranks map it while the encoder runs; if it fails, it is tried again

    def poll(self) -> bool:
        """Returns whether the embedding is here, complete and verified. Raises the reason why it will not arrive."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            receiver = self._receiver
        if receiver is None:
            return self.ready
        try:
            status, tokens = receiver.poll(), receiver.total_embedding_length
            announced = self.coordinates.tokens
            if tokens not in (-1, announced):
                why = f"the producer has {tokens} tokens where {announced} were announced; encode it again"
                raise RemoteProtocolError(why, room=receiver.room)
            if status is KVPoll.Failed:
                raise receiver.failure_exception()
        except EmbeddingTransferError as error:
            if self._restart(receiver, error):
                return False
            raise
        if status is KVPoll.Success:
            self._finish(receiver)
        return self.ready

    @property
    def is_on_its_way(self) -> bool:
        """Whether a producer has it, as far as is known; otherwise it is still being encoded."""
        receiver = self._receiver
        return not self.coordinates.is_awaited or receiver is None or receiver.total_embedding_length >= 0

    @property
    def can_be_evicted(self) -> bool:
        """Whether no request needs it and no rank may still be about to map it."""
        return self.ready and not self.users and self.shared is not None and not self.shared.is_loading

    def close(self, outcome: str = "aborted") -> None:
        """Ends the transfer if it is under way, and lets no worker map the memory from now on."""
        with self._lock:
            self._is_closed = True
            receiver, self._receiver, self._asked_because = self._receiver, None, None
            shared, self.shared = self.shared, None
        if receiver is not None:
            receiver.abort()
            self._count(receiver, outcome)
        self._end_trace(receiver, outcome)
        if receiver is not None:
            receiver.clear()
        if shared is not None:
            shared.close()

    def _open(self, endpoint: str) -> None:
        """Starts the transfer. The lock is held, or no other thread knows this object yet."""
        coordinates, claim = self.coordinates, new_claim(self.coordinates.room, self._consumer)
        manager = self._managers.get(coordinates.shape.layout)
        receiver = manager.open(
            claim.room,
            endpoint,
            GatherSink(make=partial(self._make_rows, manager)),
            failover_timeout=None if self._router is None else self._router.max_wait_s,
            max_tokens=coordinates.tokens,
            name=claim.name,
            offer_timeout=ENCODE_S if coordinates.is_awaited else None,
        )
        receiver.on_change(lambda: self._changed(receiver))
        self._manager, self._receiver = manager, receiver
        receiver.init()

    def _make_rows(self, manager: ReceiveManager, tokens: int) -> dict[str, ByteRows]:
        """Allocates the memory, which the ranks map while the embedding arrives.

        Runs on the manager's callback thread with the sink's lock held, possibly after the transfer has ended here.
        """
        with self._lock:
            is_current = manager is self._manager and self._receiver is not None
            if tokens != self.coordinates.tokens or not is_current:
                return {}  # the sink refuses it, and poll() says why
            return {"input_embeddings": self._allocate().rows}

    def _allocate(self) -> SharedRows:
        """Returns the memory, which every rank is asked to map."""
        with self._lock:
            if self.shared is None:
                shared = SharedRows.make(self.coordinates.shape, self._workers.ranks)
                try:
                    self._workers.share(shared, self._mapped)
                except BaseException:
                    shared.close()
                    raise
                self.shared = shared
            return self.shared

    def _mapped(self) -> None:
        """Every rank has mapped the memory, or one could not. Runs on the channel's thread without locks."""
        if self._has_ended:
            self._on_end()

    def _is_being_mapped(self) -> bool:
        shared = self.shared
        try:
            return shared is not None and not self._workers.is_mapped_here(shared)
        except EmbeddingTransferError:
            return False

    def _finish(self, receiver: EmbeddingReceiver) -> None:
        rows = receiver.arrays()["input_embeddings"]
        digest, announced = digest_of(rows, self.coordinates.shape), receiver.content_digest
        same = digest.hex() in self._digests or (self.coordinates.is_awaited and digest == announced)
        if not same or self.shared is None:
            why = "the received embedding is not the announced one; encode it again"
            raise IntegrityError(why, room=self.coordinates.room)
        self._count(receiver, "success")
        self._end_trace(receiver)
        receiver.clear()
        with self._lock:
            self._receiver = None
        self._workers.complete(self.shared, self._on_end)
        self.ready = True

    def _count(self, receiver: EmbeddingReceiver, outcome: str) -> None:
        shape, received = self.coordinates.shape, receiver.verified_tokens
        self._counters.add("transfers", label=outcome)
        self._counters.add("resumed_transfers", max(0, receiver.transfers - 1))
        self._counters.add("wire_bytes", received * shape.token_bytes)
        if outcome == "success":
            self._counters.add("tokens", shape.tokens)
            self._counters.add("embedding_bytes", shape.nbytes)
            self._counters.add("repeated_bytes", max(0, received - shape.tokens) * shape.token_bytes)
            self._counters.observe_seconds(time.monotonic() - self._began)

    def _end_trace(self, receiver: EmbeddingReceiver | None, error: str = "") -> None:
        if self._trace is not None:
            self._trace.end(receiver, self.coordinates.shape.token_bytes, error)

    # Coordinates without an endpoint, or a manager that has failed: the router names the producer.

    def _ask_for_endpoint(self, because: EmbeddingTransferError) -> None:
        room = self.coordinates.room
        if self._router is None:
            why = "it was evicted here, no producer offers it, and no router is configured (ec_connector_extra_config)"
            raise PeerGone(why, room=room)
        self._asked_because = because
        answer = self._router.failover(self.coordinates, because)
        answer.add_done_callback(self._endpoint_named)

    def _endpoint_named(self, answer: Future[Coordinates]) -> None:
        """Starts the transfer. Runs on a thread of the router's client, or on the caller's of its method."""
        with self._lock:
            because, self._asked_because = self._asked_because, None
            if answer.cancelled() or because is None:
                return
            problem = attempt(self._open_at, answer)
            if problem is None:
                return
            error = as_transfer_error("the transfer", problem, self.coordinates.room)
            why = f"{because.detail}, and cannot be obtained again: {error.detail}"
            self._failure = type(because)(why, room=self.coordinates.room, retryable=because.retryable)
        self._on_end()

    def _open_at(self, answer: Future[Coordinates]) -> None:
        self._open(self._accept(answer.result()))

    def _restart(self, receiver: EmbeddingReceiver, error: EmbeddingTransferError) -> bool:
        """Asks the router for a producer once more if this engine's own manager has failed. Any thread.

        Returns:
            Whether it does so, so that the transfer has not failed yet.
        """
        with self._lock:
            if self._receiver is not receiver:
                return not self._is_closed  # another thread has done so
            if self._router is None or self._has_restarted or self._manager is None or self._manager.fault is None:
                return False
            self._has_restarted, self._receiver = True, None
            shared, self.shared = self.shared, None  # the old transfer may still write into it
            extra = {"room": receiver.room}
            log.warning("room %d: %s; asks the router for a producer again", receiver.room, error, extra=extra)
            if self._trace is not None:
                self._trace.lost(error.code)
            self._ask_for_endpoint(error)
        self._count(receiver, "failed")
        if shared is not None:
            shared.close()
        return True

    # Failover: the producer was lost, the router names another one.

    def _changed(self, receiver: EmbeddingReceiver) -> None:
        """Reports the end, and asks the router if the producer is lost.

        Runs on the manager's callback thread without locks, possibly after later events. It may not block.
        """
        try:
            status = receiver.poll()
            error = receiver.failure_exception() if status is KVPoll.Failed else None
            if self._trace is not None:
                self._trace.changed(receiver, is_complete=status is KVPoll.Success)
        except EmbeddingTransferError as stopped:  # the manager is closed, or has failed
            status, error = KVPoll.Failed, stopped
        if error is not None and self._restart(receiver, error):
            return
        if status in (KVPoll.Success, KVPoll.Failed):
            self._has_ended = True  # before the check: the channel's thread does the same in the other order
            if status is KVPoll.Failed or not self._is_being_mapped():
                self._on_end()
        lost = receiver.lost
        with self._lock:
            if self._receiver is not receiver or self._router is None or lost is None or lost is self._reported_loss:
                return
            self._reported_loss = lost
        endpoint = self.coordinates.endpoint
        extra = {"room": receiver.room}
        log.warning("room %d: the producer at %s is lost: %s", receiver.room, endpoint, lost, extra=extra)
        self._counters.add("losses", label=lost.code)
        if self._trace is not None:
            self._trace.lost(lost.code)
        answer = self._router.failover(self.coordinates, lost)
        answer.add_done_callback(lambda answer: self._fail_over(receiver, lost, answer))

    def _fail_over(
        self, receiver: EmbeddingReceiver, lost: EmbeddingTransferError, answer: Future[Coordinates]
    ) -> None:
        """Continues with the producer that the router named. Runs on a thread of the router's client, without locks."""
        if answer.cancelled() or self._receiver is not receiver:
            return
        problem = attempt(self._redirect, receiver, answer)
        if problem is not None:
            error = as_transfer_error("the failover", problem, lost.room)
            self._counters.add("failovers", label="none")
            why = f"{lost.detail}; no other producer took over: {error.detail}"
            receiver.abort(type(lost)(why, room=lost.room, retryable=lost.retryable))

    def _redirect(self, receiver: EmbeddingReceiver, answer: Future[Coordinates]) -> None:
        """Counts the failover before the transfer goes on: it may be complete before this thread runs again."""
        endpoint, room = check_endpoint(self._accept(answer.result())), self.coordinates.room
        self._counters.add("failovers", label="found")
        log.info("room %d continues at %s", room, endpoint, extra={"room": room})
        receiver.redirect(endpoint)

    def _accept(self, other: Coordinates) -> str:
        """Takes over the coordinates that the router named, and returns their endpoint.

        Raises RemoteProtocolError if they name another room or another shape, or no endpoint.
        """
        mine, theirs = ((each.room, each.shape, each.version) for each in (self.coordinates, other))
        if mine != theirs:
            why = f"the router named an embedding {theirs} in place of {mine}"
            raise RemoteProtocolError(why, room=self.coordinates.room)
        if other.endpoint is None:
            raise RemoteProtocolError("the router named no producer", room=self.coordinates.room)
        with self._lock:
            self._digests.add(other.digest)
            self.coordinates = other
        return other.endpoint
