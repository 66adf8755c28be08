"""Cache of a producer's embeddings in its scheduler. Workers publish into it.

A worker waits until the scheduler has mapped the embedding, so everything that a request needs is in the cache when the
request finishes.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from embferry import CapacityError, EmbeddingTransferError
from embferry.transfer.failures import attempt

from ..shared.counters import Counters
from ..shared.shared_rows import SharedRows
from .channel import Publish
from .config import MAX_KEPT
from .workers import Workers


class CachedEmbedding:
    """A published embedding in the scheduler, which holds its memory.

    Attributes:
        is_new: Whether it was encoded and has not been offered yet.
    """

    def __init__(self, published: Publish, shared: SharedRows) -> None:
        self.mm_hash, self.digest, self.is_new = published.mm_hash, published.digest, published.encoded
        self.shared = shared
        self.nbytes = shared.rows.nbytes


class ProducerCache:
    """Keeps the latest ``budget`` bytes and everything that running requests need.

    Every method may be called from any thread.

    Attributes:
        on_encoded: Called with each embedding that a worker has encoded, on the thread of the channel, without locks.
            It may not block.
        on_published: Called with the hash of each embedding that a worker has published, when it is in the cache.
            Thread, locks and time are as for ``on_encoded``.
    """

    def __init__(self, budget: int, max_embedding_bytes: int, counters: Counters, workers: Workers) -> None:
        self._budget, self._max_embedding_bytes = budget, max_embedding_bytes
        self._counters, self._workers = counters, workers
        self._embeddings: OrderedDict[str, CachedEmbedding] = OrderedDict()
        self._holds: Counter[str] = Counter()
        self.nbytes = 0
        self._lock = threading.Lock()
        self.on_encoded: Callable[[Publish, SharedRows], object] = lambda published, shared: None
        self.on_published: Callable[[str], object] = lambda mm_hash: None
        workers.on_publish = self.take

    def find(self, mm_hash: str) -> CachedEmbedding | None:
        with self._lock:
            found = self._embeddings.get(mm_hash)
            if found is not None:
                self._embeddings.move_to_end(mm_hash)
            return found

    def hold(self, hashes: Iterable[str]) -> None:
        """Keeps these embeddings for a running request, including those that are published later."""
        with self._lock:
            self._holds.update(hashes)

    def release(self, hashes: Iterable[str]) -> None:
        """Ends one :meth:`hold` of these embeddings."""
        with self._lock:
            self._holds.subtract(hashes)
            self._holds = +self._holds
            self._evict()

    def is_mapping(self, hashes: Iterable[str]) -> bool:
        """Returns whether a rank is still mapping one of these embeddings; the first call for one begins that."""
        with self._lock:
            found = [self._embeddings[mm_hash].shared for mm_hash in hashes if mm_hash in self._embeddings]
        mapping = [self._is_being_mapped(shared) for shared in found]  # begins with all at once
        return any(mapping)

    def put(self, embedding: CachedEmbedding) -> None:
        """Inserts an embedding as the latest one, in place of one with the same hash.

        An old one that a running request needs or a rank may be about to load stays, and the new one is closed.
        """
        with self._lock:
            old = self._embeddings.pop(embedding.mm_hash, None)
            if old is not None:
                self.nbytes -= old.nbytes
                is_needed = embedding.mm_hash in self._holds and old.shared.is_open
                if old is not embedding and (is_needed or old.shared.is_loading):
                    old, embedding = embedding, old
                if old is not embedding:
                    embedding.is_new = embedding.is_new or old.is_new
                    old.shared.close()
            self.nbytes += embedding.nbytes
            self._embeddings[embedding.mm_hash] = embedding
            self._evict()

    def take(self, published: Publish, fd: int) -> None:
        """Inserts a worker's embedding, and owns the descriptor of its memory. Runs on the thread of the channel.

        Raises:
            EmbeddingTransferError: The memory is not what the worker says, or too much.
            OSError: It cannot be mapped.
        """
        embedding = CachedEmbedding(published, SharedRows.adopt(fd, published.shape, self._workers.ranks))
        if embedding.nbytes > self._max_embedding_bytes:
            embedding.shared.close()
            why = f"it has {embedding.nbytes} bytes; the limit is {self._max_embedding_bytes}"
            raise CapacityError(f"{why}; raise max_embedding_bytes", retryable=False)
        if embedding.is_new:
            self._counters.add("items_encoded")
            attempt(self.on_encoded, published, embedding.shared)
        self.put(embedding)
        attempt(self.on_published, published.mm_hash)

    def close(self) -> None:
        with self._lock:
            for embedding in self._embeddings.values():
                embedding.shared.close()
            self._embeddings.clear()
            self.nbytes = 0

    def _is_being_mapped(self, shared: SharedRows) -> bool:
        if attempt(self._workers.share, shared) is not None:
            return False  # it was closed, or no descriptor is left: it is encoded again
        self._workers.complete(shared)
        try:
            return not self._workers.is_mapped(shared)
        except EmbeddingTransferError:
            return False

    def _evict(self) -> None:
        for mm_hash, embedding in list(self._embeddings.items()):
            if (self.nbytes <= self._budget and len(self._embeddings) <= MAX_KEPT) or len(self._embeddings) == 1:
                return
            if mm_hash not in self._holds and not embedding.shared.is_loading:
                del self._embeddings[mm_hash]
                self.nbytes -= embedding.nbytes
                embedding.shared.close()
