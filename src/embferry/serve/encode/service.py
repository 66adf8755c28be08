"""The rooms of an encode worker, its queues, and the one thread that runs the vision encoder.

    decoding --announce--> BootstrapQueue --the language side opens--> to encode --> InflightQueue --delivered--> end

Encoding starts when the language side has opened the transfer. This costs an idle worker one round trip, because the
router passes the response of ``/encode`` on at once. It spares a busy worker the requests whose client has left or
whose language worker had no capacity. Until then a request holds its pixels, but no embedding.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from embferry.cache.contract import Store
from embferry.disaggregation.multimodal_embedding import (
    MultimodalEmbeddingBootstrapQueue,
    MultimodalEmbeddingInflightQueue,
    MultimodalEmbeddingRequest,
)
from embferry.disaggregation.queues import SendingEnd
from embferry.disaggregation.wires import SendingManager
from embferry.engine.cache import EmbeddingCache
from embferry.engine.embedding import Embedding
from embferry.engine.encoder import Encoder
from embferry.engine.errors import RequestError
from embferry.engine.media import PreparedItem
from embferry.protocol.errors import Aborted, CapacityError, EmbeddingTransferError, PeerGone
from embferry.protocol.states import KVPoll
from embferry.serve.byte_budget import Hold
from embferry.serve.config import Settings
from embferry.serve.encode.freed_memory import FreedMemory, dropping_locals
from embferry.serve.encode.messages import EncodeItem, EncodeRequest
from embferry.serve.encode.metrics import EncodeMetrics
from embferry.serve.encode.preparation import in_turn, prepare_item
from embferry.serve.encode.room import Room, pixel_bytes
from embferry.serve.encode.room_trace import RoomTrace
from embferry.serve.encode.self_test import SelfTest
from embferry.serve.encode.shared_cache import SharedCache, SharedCacheMetrics
from embferry.serve.encode.turns import Turns
from embferry.serve.errors import ServeError
from embferry.serve.media.decoding.cancellation import CancelledWorkError
from embferry.serve.media.decoding.pool import PROCESSES
from embferry.serve.shared_threads import SharedThreads
from embferry.serve.worker.errors import as_serve_error
from embferry.serve.worker.service import Service
from embferry.traces.context import TraceContext
from embferry.transfer.failures import attempt

T = TypeVar("T")
log = logging.getLogger(__name__)


class EncodeService(Service[SendingManager, int, Room]):
    """The rooms of an encode worker.

    One lock guards rooms and queues. Lock order: this lock, then the manager's. A change of a transfer wakes the
    encoder thread from the thread that made it, without a lock of the manager.
    """

    role, thread_name = "encode", "encoder"
    metrics: EncodeMetrics

    def __init__(
        self, encoder: Encoder, manager: SendingManager, settings: Settings, store: Store | None = None
    ) -> None:
        """Starts the threads. ``store``: the cache that encoders share, closed with the service."""
        super().__init__(manager, settings)
        self.encoder = encoder
        self.cache = EmbeddingCache(settings.encode.cache_bytes)
        self.metrics = EncodeMetrics(self.cache, self._states)
        self.metrics.watch(manager, self.budget)
        self._bootstrapping = MultimodalEmbeddingBootstrapQueue(self._on_failure)
        self._decoders = SharedThreads(PROCESSES, "decode", spares=True)
        self.self_test = SelfTest(encoder.media, settings.media, self._decoders, self._wake.set)
        self._freed = FreedMemory()
        self._inflight = MultimodalEmbeddingInflightQueue(self._on_failure)
        self._shared: SharedCache | None = None
        if store is not None:
            counts = SharedCacheMetrics(self.metrics, store)
            self._shared = SharedCache(store, encoder, self.cache, counts, settings, self._wake.set)
        self._turns = Turns(self._shared)
        self._thread.start()

    # Called by the HTTP endpoints, on any thread

    def expect(self, nbytes: int, caller: str = "") -> None:
        """Makes room for a request, if embeddings that no language worker has asked for take it.

        Args:
            nbytes: of the request's body.
            caller: the address of its client.
        """
        with self._lock:
            self._displace_for(caller, lambda: self.budget.held + nbytes > self.budget.limit)

    def admit(
        self, request: EncodeRequest, hold: Hold | None = None, caller: str = "", call: TraceContext | None = None
    ) -> Room:
        """Opens a room for a request that is about to be decoded. :meth:`announce` or :meth:`drop` must follow.

        Args:
            request: the decoded request.
            hold: the request's share of ``budget``, which the room releases at its end; None: a new one.
            caller: the address of the request's client.
            call: the span of the caller, if the room is to have spans.

        Raises:
            CapacityError: ``encode.max_rooms`` are open, or the worker is shutting down.
            ServeError: the room is in use.
        """
        with self._lock:
            if request.room in self._open:
                raise ServeError("invalid_request", f"room {request.room} is in use; choose another number", status=409)
            most = self.settings.encode.max_rooms
            self._displace_for(caller, lambda: len(self._open) >= most)
            self._check_capacity(most, "encode.max_rooms", request.room)
            room = self._open[request.room] = self._new_room(request, hold or self.budget.hold(), caller)
            room.client = request.client or caller
            room.trace = None if self.tracer is None or call is None else RoomTrace(self.tracer, call)
            return room

    def _new_room(self, request: EncodeRequest, hold: Hold, caller: str) -> Room:
        return Room(request.room, hold, caller)

    async def prepare_all(self, request: EncodeRequest, room: Room) -> list[PreparedItem]:
        """Decodes the request's items. Clients take turns, item by item.

        Raises:
            EmbeddingTransferError: the room was aborted meanwhile, and why.
            ServeError: those of :meth:`prepare`, with the place of the item in ``param`` if the item is at fault.
        """
        return [await self._prepared(item, room) for item in request.items]

    async def check_fit(self) -> None:
        """Refuses a request while no encode succeeds, after one more try.

        Raises:
            ServeError: worker_unfit.
        """
        if self.self_test.trouble is not None and (why := await self.self_test.result()) is not None:
            raise ServeError("worker_unfit", f"this encode worker encodes nothing: {why}; another one may")

    async def unready(self) -> str | None:
        """A busy worker is ready: its encodes will tell."""
        if self.self_test.trouble is None and (self.load or not self.self_test.is_due):
            return None
        return await self.self_test.result()

    def prepare(self, item: EncodeItem, room: Room) -> PreparedItem:
        """Decodes an item of a request; see :func:`.preparation.prepare_item`. Blocks while it decodes.

        Raises:
            ServeError: capacity_exhausted, among others: only now it is known what the room is going to hold.
            CancelledWorkError: the room was aborted meanwhile.
        """
        began = time.monotonic()
        try:
            with room.hold.passing() as grow, self._freed.counting(grow) as grow_counted, dropping_locals():
                prepared = prepare_item(item, self.encoder.media, self.settings.media, room.decoding, grow_counted)
        except ServeError as error:
            if error.code == "media_decoder_failed":
                self.self_test.begin()
            raise
        finally:
            self._freed.give_back()
        room.hold.add(pixel_bytes(prepared) + prepared.num_tokens * self.manager.layout.token_bytes)
        self.metrics.prepare_seconds.observe(time.monotonic() - began)
        return prepared

    async def _prepared(self, item: EncodeItem, room: Room) -> PreparedItem:
        try:
            return await self._in_turn(room, partial(self.prepare, item, room))
        except RequestError as error:
            refusal = as_serve_error(error)
        except ServeError as error:
            refusal = error
        raise refusal.at(item.param) if item.param and refusal.http_status < 500 else refusal

    async def _in_turn(self, room: Room, call: Callable[[], T]) -> T:
        """Runs ``call`` on a thread for decoding, in a turn of the room's client. Raises why the room was aborted."""
        try:
            return await in_turn(self._decoders, room.client, call, room.decoding)
        except CancelledWorkError as error:
            raise room.failure or _aborted(room) from error

    def announce(self, room: Room, items: Sequence[PreparedItem]) -> None:
        """Opens the sending end of the transfer, which tells the language side length and digest of the embedding.

        Raises:
            Aborted: the room was aborted during decoding.
        """
        room.set_items(items)
        room.count_bytes(self.manager.layout.token_bytes)  # the files are not needed any more
        with self._lock:
            if room.failure is not None:
                raise room.failure
            sender = self.manager.open(room.number)
            try:
                sender.wake_on_change(self._wake.set)
                self._bootstrapping.add(room, sender, room.total_tokens, room.digest, room.aux)
            except BaseException:
                sender.clear()
                raise
            room.sender, room.announced_at = sender, time.monotonic()
            if room.trace is not None:
                room.trace.announced(room.announced_at)
        self._wake.set()

    def drop(self, room: Room) -> None:
        """Closes a room that will not be announced. Does nothing if it has been announced."""
        room.decoding.cancel()
        with self._lock:
            if room.sender is None:
                self._end(room, "refused")

    def room(self, number: int) -> Room | None:
        """Returns the room with this number, or None if it is not open."""
        with self._lock:
            return self._open.get(number)

    def claim(self, room: Room) -> None:
        """Has the room encoded even if no language worker opens the transfer. Idempotent."""
        room.claimed = True
        self._wake.set()

    def abort_room(self, room: int) -> bool:
        with self._lock:
            known = self._open.get(room)
            if known is None:
                return False
            known.abort(_aborted(known))
        self._wake.set()
        return True

    def close(self) -> None:
        with self._lock:
            self._refusing = True
            for room in self._open.values():
                room.abort(PeerGone("the encode worker is shutting down; ask again", room=room.number))
        self._decoders.close()
        super().close()
        if self._shared is not None:
            self._shared.close()
        with self._lock:
            for room in list(self._open.values()):
                self._end(room, "aborted")

    # Called on the encoder thread

    def _step(self) -> bool:
        if self.self_test.run(self.encoder.encode):
            return True
        request = self._next()
        if request is not None:
            self._encode(request)
        else:
            self._freed.give_back()
        return request is not None

    def _wait_seconds(self) -> float | None:
        with self._lock:
            return self._turns.seconds()

    def _next(self) -> MultimodalEmbeddingRequest | None:
        """Advances the queues and returns the next request to encode, if any."""
        with self._lock:
            for request in (*self._bootstrapping.pop_bootstrapped(), *self._take_claimed()):
                self._turns.begin(request)
            for request in self._inflight.pop_transferred():
                room: Room = request.req
                self.metrics.tokens.inc(room.total_tokens)
                self.metrics.bytes.inc(request.embedding_sender.sent_bytes)
                self._end(room, "delivered")
            return self._turns.next()

    def _encode(self, request: MultimodalEmbeddingRequest) -> None:
        """Encodes the next item of a request, one item per call (see :class:`Encoder`), and sends its rows.

        An error in it ends this request only.
        """
        room: Room = request.req
        sender = request.embedding_sender
        try:
            is_unfinished = self._encode_next(room, sender)
        except Exception as error:
            log.error("the media could not be encoded", exc_info=error, extra={"room": room.number})
            self.self_test.begin()
            why = "the vision encoder failed on the request's media; see the encode worker's log"
            room.waiting.clear()
            is_unfinished = False
            if not self._abort(sender, EmbeddingTransferError(why, room=room.number)):
                with self._lock:
                    self._end(room, "failed")
                return
        with self._lock:
            if is_unfinished:
                self._turns.add(request)
            else:
                self._inflight.add(request)

    def _encode_next(self, room: Room, sender: SendingEnd) -> bool:
        """Encodes and sends the next item, unless the transfer has ended. Returns whether more are to follow."""
        if sender.poll() in (KVPoll.Failed, KVPoll.Success):  # success: the language worker has kept all of it
            return False
        if room.waiting:
            item = room.waiting[0]
            if room.trace is not None:
                room.trace.item_begins()
            try:
                room.add(self.cache.pin(item.digest, lambda: self._encode_item(item, room)), self.encoder.fields)
            finally:
                room.end_lookup()
            if room.trace is not None:
                room.trace.item_ends(item)
        sender.send_embedding(*room.encoded)
        room.count_bytes(self.manager.layout.token_bytes)
        return bool(room.waiting) and sender.poll() not in (KVPoll.Failed, KVPoll.Success)

    def _encode_item(self, item: PreparedItem, room: Room) -> Embedding:
        if room.trace is not None:
            room.trace.encodes()
        began = time.monotonic()
        embedding = self.encoder.encode(item)
        self.self_test.succeeded()
        self.metrics.encode_seconds.observe(time.monotonic() - began)
        self.metrics.items.labels(item.kind).inc()
        if self._shared is not None:
            self._shared.keep(item, embedding)
        return embedding

    def _abort(self, sender: SendingEnd, error: EmbeddingTransferError) -> bool:
        """Ends a transfer, unless it has ended. Returns whether that was possible."""
        failed = attempt(sender.abort, error)
        if failed is not None:
            log.error("the transfer could not be aborted", exc_info=failed, extra={"room": sender.room})
        return failed is None

    # Called with the lock held

    def _take_claimed(self) -> list[MultimodalEmbeddingRequest]:
        waiting = self._bootstrapping.queue
        claimed = [request for request in waiting if request.req.claimed]
        waiting[:] = [request for request in waiting if not request.req.claimed]
        return claimed

    def _displace_for(self, caller: str, is_full: Callable[[], bool]) -> None:
        """Ends embeddings that no language worker has asked for, while there is no room for a request of ``caller``."""
        while is_full() and not self._refusing and (victim := self._displaceable(caller)) is not None:
            room: Room = victim.req
            self._bootstrapping.queue.remove(victim)
            why = "no language worker asked for the embedding, so it made room for another request; ask again"
            self._abort(victim.embedding_sender, CapacityError(why, room=room.number))
            self._end(room, "displaced")

    def _displaceable(self, caller: str) -> MultimodalEmbeddingRequest | None:
        """Returns the oldest unclaimed request: of all, if it is old; else of a caller with more than ``caller``."""
        waiting = [one for one in self._bootstrapping.queue if one.embedding_sender.poll() is KVPoll.Bootstrapping]
        waiting = [one for one in waiting if not one.req.claimed]
        if not waiting:
            return None
        if time.monotonic() - waiting[0].req.announced_at >= self.settings.encode.unclaimed_grace:
            return waiting[0]
        counts = Counter(one.req.caller for one in waiting)
        most, count = counts.most_common(1)[0]
        return next(one for one in waiting if one.req.caller == most) if count > counts[caller] + 1 else None

    def _on_failure(self, request: MultimodalEmbeddingRequest, error: EmbeddingTransferError) -> None:
        self._abort(request.embedding_sender, error)
        self._end(request.req, "aborted" if isinstance(error, Aborted) else "failed")

    def _end(self, room: Room, outcome: str) -> None:
        if (error := attempt(room.release)) is not None:
            log.error("its memory could not be released", exc_info=error, extra={"room": room.number})
        self._freed.add(room.hold.peak)
        if self._open.pop(room.number, None) is not None:  # only now: a worker without a request holds nothing
            self.metrics.finished.labels(outcome).inc()
            if room.trace is not None:
                room.trace.end(outcome, 0 if room.sender is None else room.sender.sent_bytes)
        self._wake.set()  # the encoder thread returns the memory, if it has nothing else to do
        self._idle.notify_all()

    def _states(self) -> dict[str, float]:
        with self._lock:
            announced = sum(room.sender is not None for room in self._open.values())
            bootstrapping, inflight = len(self._bootstrapping), len(self._inflight)
            return {
                "decoding": len(self._open) - announced,
                "bootstrapping": bootstrapping,
                "encoding": announced - bootstrapping - inflight,
                "inflight": inflight,
            }


def _aborted(room: Room) -> Aborted:
    return Aborted("the request was aborted at the encode worker", room=room.number)
