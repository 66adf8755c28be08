"""Embeddings kept by content: the same picture is not encoded twice, not even when it is asked for twice at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from embferry.engine.embedding import Embedding


@dataclass(slots=True)
class CacheCounters:
    """``hits`` counts lookups that encoded nothing, including those that waited for another's encode."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    embedding: Embedding
    pins: int


class EmbeddingCache:
    """Embeddings by digest, least recently used first to go, with a budget in bytes. Thread-safe.

    An embedding somebody holds a lease on is never evicted, so the bytes held can pass the budget while more is in use
    than it allows; they return below it as the leases end. A budget of 0 keeps nothing, and still encodes once what is
    asked for several times at once.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"the budget of a cache cannot be {budget_bytes} bytes")
        self.budget_bytes = budget_bytes
        self.counters = CacheCounters()
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._encoding: dict[bytes, Future[Embedding | None]] = {}
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._entries

    def lease(self, digest: bytes, encode: Callable[[], Embedding]) -> Lease:
        """A lease on the embedding of this digest, made by ``encode`` if it is not there.

        Whatever ``encode`` raises is raised here, and in every call that waited for it; the next call tries again.
        """
        while True:
            with self._lock:
                entry = self._entries.get(digest)
                if entry is not None:
                    self.counters.hits += 1
                    return self._pin(digest, entry.embedding)
                running = self._encoding.get(digest)
                if running is None:
                    self.counters.misses += 1
                    mine = self._encoding[digest] = Future()
                    break
            embedding = running.result()
            if embedding is not None:
                with self._lock:
                    self.counters.hits += 1
                    return self._pin(digest, embedding)
        return self._encode(digest, encode, mine)

    def _encode(self, digest: bytes, encode: Callable[[], Embedding], done: Future[Embedding | None]) -> Lease:
        try:
            embedding = encode()
        except BaseException as error:
            with self._lock:
                del self._encoding[digest]
            # Those who wait share a failure of the encoder, but not the interruption of this thread: they try again.
            if isinstance(error, Exception):
                done.set_exception(error)
            else:
                done.set_result(None)
            raise
        with self._lock:
            lease = self._pin(digest, embedding)
            del self._encoding[digest]
        done.set_result(embedding)
        return lease

    def _pin(self, digest: bytes, embedding: Embedding) -> Lease:
        """Needs the lock. Puts the embedding in if it is not there: it may have gone while its waiters woke up."""
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = _Entry(embedding, pins=0)
            self._bytes += embedding.nbytes
        entry.pins += 1
        self._entries.move_to_end(digest)
        self._evict()
        return Lease(self, digest, entry.embedding)

    def _unpin(self, digest: bytes) -> None:
        with self._lock:
            self._entries[digest].pins -= 1
            self._evict()

    def _evict(self) -> None:
        idle = (digest for digest, entry in list(self._entries.items()) if not entry.pins)
        while self._bytes > self.budget_bytes and (digest := next(idle, None)) is not None:
            self._bytes -= self._entries.pop(digest).embedding.nbytes
            self.counters.evictions += 1


class Lease:
    """Holds an embedding in the cache until released; a context manager. Releasing twice is harmless."""

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
