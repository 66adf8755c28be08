"""Cache of embeddings by content: requests for the same picture, also concurrent ones, encode it once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from embferry.engine.embedding import Embedding


@dataclass(slots=True)
class CacheCounters:
    """Counters of lookups and of embeddings removed. A lookup that waited for another thread's encode is a hit."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    embedding: Embedding
    pins: int


class EmbeddingCache:
    """Embeddings by digest, with a budget in bytes; the least recently used is evicted first. Thread-safe.

    A pinned embedding is never evicted, so the bytes held can exceed the budget while more than that is in use; they
    fall below it as the pins are released. A budget of 0 keeps nothing, but concurrent lookups still encode once.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"the budget of a cache must be at least 0 bytes, not {budget_bytes}")
        self.budget_bytes = budget_bytes
        self.counters = CacheCounters()
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._encoding: dict[bytes, Future[Embedding | None]] = {}
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        return self._bytes

    def pin(self, digest: bytes, encode: Callable[[], Embedding]) -> Pin:
        """Returns a pin on the embedding of this digest, after calling ``encode`` if the cache does not hold it.

        ``encode`` runs on the calling thread, without the cache's lock, and may block. An exception of it is raised
        here and in every call that waited for it; the next call encodes again.
        """
        while True:
            with self._lock:
                entry = self._entries.get(digest)
                if entry is not None:
                    self.counters.hits += 1
                    return self._pinned(digest, entry.embedding)
                running = self._encoding.get(digest)
                if running is None:
                    self.counters.misses += 1
                    mine = self._encoding[digest] = Future()
                    break
            embedding = running.result()
            if embedding is not None:
                with self._lock:
                    self.counters.hits += 1
                    return self._pinned(digest, embedding)
        return self._encode(digest, encode, mine)

    def holds(self, digest: bytes) -> bool:
        """Returns whether the embedding of this digest is here, or is being encoded."""
        with self._lock:
            return digest in self._entries or digest in self._encoding

    def put(self, digest: bytes, embedding: Embedding) -> Pin:
        """Adds an embedding that was not encoded here, unless the cache holds it. Returns a pin on the cache's."""
        with self._lock:
            return self._pinned(digest, embedding)

    def _encode(self, digest: bytes, encode: Callable[[], Embedding], done: Future[Embedding | None]) -> Pin:
        try:
            embedding = encode()
        except BaseException as error:
            with self._lock:
                del self._encoding[digest]
            # Waiting threads share a failure of the encoder. An interruption concerns this thread alone; None makes the
            # others try again.
            if isinstance(error, Exception):
                done.set_exception(error)
            else:
                done.set_result(None)
            raise
        with self._lock:
            pin = self._pinned(digest, embedding)
            del self._encoding[digest]
        done.set_result(embedding)
        return pin

    def _pinned(self, digest: bytes, embedding: Embedding) -> Pin:
        """Returns a new pin; the caller holds the lock.

        Adds the embedding if it is not there, because it may have been evicted before a waiting thread woke up.
        """
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = _Entry(embedding, pins=0)
            self._bytes += embedding.nbytes
        entry.pins += 1
        self._entries.move_to_end(digest)
        self._evict()
        return Pin(self, digest, entry.embedding)

    def _unpin(self, digest: bytes) -> None:
        with self._lock:
            self._entries[digest].pins -= 1
            self._evict()

    def _evict(self) -> None:
        idle = (digest for digest, entry in list(self._entries.items()) if not entry.pins)
        while self._bytes > self.budget_bytes and (digest := next(idle, None)) is not None:
            self._bytes -= self._entries.pop(digest).embedding.nbytes
            self.counters.evictions += 1


class Pin:
    """Keeps an embedding in the cache until released; a context manager. Releasing it again does nothing."""

    def __init__(self, cache: EmbeddingCache, digest: bytes, embedding: Embedding) -> None:
        self.embedding = embedding
        self._digest = digest
        self._cache: EmbeddingCache | None = cache

    def release(self) -> None:
        cache, self._cache = self._cache, None
        if cache is not None:
            cache._unpin(self._digest)

    def __enter__(self) -> Embedding:
        return self.embedding

    def __exit__(self, *_: object) -> None:
        self.release()
