"""The consumer in the scheduler: receives embeddings into memory that its workers can map.

Threads of the library move the bytes. Nothing here waits for a step of a worker.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from embferry import (
    CapacityError,
    EmbeddingTransferError,
    Geometry,
    Layout,
    LayoutMismatch,
    ReceiveManager,
)
from embferry.traces.context import TraceContext
from embferry.traces.spans import Tracer

from ..shared.counters import Counters
from ..shared.managers import Managers
from ..shared.shared_rows import SharedRows
from ..shared.transfer_trace import TransferTrace
from .claims import new_consumer
from .config import MAX_KEPT, ConnectorConfig
from .coordinates import Coordinates
from .incoming_embedding import IncomingEmbedding
from .router_client import RouterClient
from .workers import Workers


class Consumer:
    """Receives the embeddings of one engine, with one block pool for each layout.

    Complete embeddings are kept for later requests within ``cache_bytes``. The scheduler's thread calls the methods.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        counters: Counters,
        router: RouterClient | None,
        workers: Workers,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._config, self._counters, self._router, self._workers = config, counters, router, workers
        self._managers: Managers[ReceiveManager] = Managers(self._new_manager, counters, is_busy=self._is_under_way)
        self._embeddings: OrderedDict[str, IncomingEmbedding] = OrderedDict()
        self._changed = threading.Event()
        self._name = new_consumer()
        self._counters.add_gauge("kept_bytes", self._kept_bytes)

    def require(self, request: str, mm_hash: str, coordinates: Coordinates, call: TraceContext | None = None) -> bool:
        """Returns whether the embedding is here, mapped by every rank; starts its transfer if necessary.

        An embedding with this hash that is here or under way for another request is used, although its bytes may
        differ in the last bit: vLLM's own cache goes by the hash too. An embedding that is not offered yet gives way to
        an offer. When all requests that named its room have ended, it gives way to the coordinates of another request.

        ``call`` is the span of the request, under which a transfer that it starts has its own.

        Raises:
            EmbeddingTransferError: The embedding cannot be obtained.
        """
        embedding = self._embeddings.get(mm_hash)
        if embedding is not None and _gives_way(embedding, coordinates):
            users = embedding.users
            self._drop(mm_hash, "aborted")
            embedding = self._begin(mm_hash, coordinates, frozenset(), call)
            embedding.users |= users
        elif embedding is None:
            embedding = self._begin(mm_hash, coordinates, frozenset(), call)
        elif embedding.coordinates.shape != coordinates.shape:
            raise LayoutMismatch(f"the embedding {mm_hash} is here in another shape; is the same model on both sides?")
        elif request not in embedding.users:
            self._counters.add("cache_hits")
        embedding.users.add(request)
        if coordinates.room in embedding.rooms:
            embedding.owners.add(request)
        try:
            return embedding.poll() and embedding.shared is not None and self._workers.is_mapped(embedding.shared)
        except EmbeddingTransferError:
            self._drop(mm_hash, "failed")
            if coordinates.room in embedding.rooms:
                raise
            self._begin(mm_hash, coordinates, embedding.rooms, call).users.update(embedding.users)
            return False

    def wait(self, timeout: float) -> bool:
        """Returns whether, within ``timeout`` seconds, an embedding has arrived or failed since the last call."""
        changed = self._changed.wait(timeout)
        self._changed.clear()
        return changed

    @property
    def only_awaits(self) -> bool:
        """Whether no embedding is on its way: those that requests wait for are still being encoded."""
        return not any(not one.ready and one.is_on_its_way for one in self._embeddings.values())

    def find(self, mm_hash: str) -> SharedRows | None:
        """Returns the memory of an embedding that is here, complete and verified. The ranks may still be mapping it."""
        embedding = self._embeddings.get(mm_hash)
        return embedding.shared if embedding is not None and embedding.ready else None

    def release(self, request: str) -> None:
        """The request needs nothing any more.

        Embeddings that are here stay for other requests, within the budget; transfers for this request alone end.
        """
        for mm_hash, embedding in list(self._embeddings.items()):
            if request in embedding.users:
                embedding.users.discard(request)
                embedding.owners.discard(request)
                self._embeddings.move_to_end(mm_hash)
                if not embedding.ready and not embedding.users:
                    self._drop(mm_hash, "aborted")
        self._evict()

    def close(self) -> None:
        for mm_hash in list(self._embeddings):
            self._drop(mm_hash, "aborted")
        self._managers.close()

    def _begin(
        self, mm_hash: str, coordinates: Coordinates, failed_rooms: frozenset[int], call: TraceContext | None
    ) -> IncomingEmbedding:
        if coordinates.shape.nbytes > self._config.max_embedding_bytes:
            why = f"an embedding of {coordinates.shape.nbytes} bytes; the limit is {self._config.max_embedding_bytes}"
            raise CapacityError(f"{why}; raise max_embedding_bytes", room=coordinates.room, retryable=False)
        embedding = self._embeddings[mm_hash] = IncomingEmbedding(
            coordinates,
            self._managers,
            self._router,
            self._workers,
            self._counters,
            failed_rooms,
            self._changed.set,
            self._name,
            None if self._tracer is None or call is None else TransferTrace(self._tracer, call),
        )
        return embedding

    def _is_under_way(self, layout: Layout) -> bool:
        embeddings = list(self._embeddings.values())
        return any(not one.ready and one.coordinates.shape.layout == layout for one in embeddings)

    def _new_manager(self, layout: Layout) -> ReceiveManager:
        config = self._config
        geometry = Geometry(layout, config.num_blocks, config.block_size)
        transports = config.make_transports()
        return ReceiveManager(geometry, transports, name="vllm", settings=config.receiving, trust=config.trust)

    def _evict(self) -> None:
        """Drops the oldest embeddings that no request uses and no rank may still map."""
        total, count = self._kept_bytes(), len(self._embeddings)
        for mm_hash, embedding in list(self._embeddings.items()):
            if total <= self._config.cache_bytes and count <= MAX_KEPT:
                return
            if embedding.can_be_evicted:
                total, count = total - embedding.coordinates.shape.nbytes, count - 1
                self._drop(mm_hash, "")

    def _kept_bytes(self) -> int:
        embeddings = list(self._embeddings.values())
        return sum(embedding.coordinates.shape.nbytes for embedding in embeddings if embedding.ready)

    def _drop(self, mm_hash: str, outcome: str) -> None:
        self._embeddings.pop(mm_hash).close(outcome)


def _gives_way(embedding: IncomingEmbedding, coordinates: Coordinates) -> bool:
    """Returns whether other coordinates of an embedding that is not offered yet are to be used from now on."""
    if embedding.ready or embedding.is_on_its_way or embedding.coordinates.shape != coordinates.shape:
        return False
    if not coordinates.is_awaited:
        return coordinates.endpoint is not None
    return coordinates.room not in embedding.rooms and not embedding.owners
