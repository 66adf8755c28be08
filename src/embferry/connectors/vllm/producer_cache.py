"""Cache of a producer's embeddings in its scheduler, and the channel through which workers publish into it.

On the V1 runner nothing that a producer's worker reports reaches the scheduler, so the two have a socket of their own,
in the abstract name space: it disappears with its owner. A worker waits until the scheduler has mapped the embedding,
so everything that a request needs is in the cache when the request finishes.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable

import msgspec
import zmq

from embferry import LayoutMismatch, TransportError

from .config import MAX_KEPT
from .counters import Counters
from .shared_rows import RowsHandle, SharedRows

log = logging.getLogger(__name__)

CLOSE_POLL_MS = 200


class PublishedEmbedding(msgspec.Struct, frozen=True):
    """An embedding as a worker publishes it.

    Attributes:
        digest: ``digest_of`` its rows.
        encoded: Whether the worker has just encoded it; otherwise it comes from vLLM's encoder cache.
    """

    mm_hash: str
    handle: RowsHandle
    digest: bytes
    encoded: bool = True


class CachedEmbedding:
    """A published embedding in the scheduler, which holds its memory.

    Attributes:
        is_new: Whether it was encoded and has not been offered yet.
    """

    def __init__(self, published: PublishedEmbedding) -> None:
        """Raises OSError if the worker that made the memory has ended."""
        self.mm_hash, self.digest = published.mm_hash, published.digest
        self.shared = SharedRows.open(published.handle)
        self.nbytes = self.shared.rows.nbytes
        self.is_new = published.encoded


class ProducerCache:
    """Keeps the latest ``budget`` bytes and everything that running requests need.

    A thread of its own receives what workers publish. Every method may be called from any thread.
    """

    def __init__(self, name: str, budget: int, counters: Counters) -> None:
        self._budget, self._counters = budget, counters
        self._embeddings: OrderedDict[str, CachedEmbedding] = OrderedDict()
        self._holds: Counter[str] = Counter()
        self.nbytes = 0
        self._lock = threading.Lock()
        self._closing = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.bind(_address(name))
        self._thread = threading.Thread(target=self._run, name="embferry-producer-cache", daemon=True)
        self._thread.start()

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

    def put(self, embedding: CachedEmbedding) -> None:
        """Inserts an embedding as the latest one, in place of one with the same hash.

        An old one that a rank may be about to map stays, and the new one is closed.
        """
        with self._lock:
            old = self._embeddings.pop(embedding.mm_hash, None)
            if old is not None:
                self.nbytes -= old.nbytes
                if old is not embedding and old.shared.is_loading:
                    old, embedding = embedding, old
                if old is not embedding:
                    old.shared.close()
            self.nbytes += embedding.nbytes
            self._embeddings[embedding.mm_hash] = embedding
            self._evict()

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close(linger=0)
        self._context.term()
        for embedding in self._embeddings.values():
            embedding.shared.close()
        self._embeddings.clear()

    def _run(self) -> None:
        while not self._closing:
            if self._socket.poll(CLOSE_POLL_MS):
                self._socket.send(self._receive(self._socket.recv()))

    def _receive(self, message: bytes) -> bytes:
        """Inserts a worker's embedding. Returns an error message for the worker, empty on success."""
        try:
            embedding = CachedEmbedding(msgspec.msgpack.decode(message, type=PublishedEmbedding))
        except (msgspec.MsgspecError, OSError, ValueError, LayoutMismatch) as error:
            log.error("cannot take an embedding from a worker: %s", error)
            return str(error).encode()
        if embedding.is_new:
            self._counters.add("items_encoded")
        self.put(embedding)
        return b""

    def _evict(self) -> None:
        for mm_hash, embedding in list(self._embeddings.items()):
            if (self.nbytes <= self._budget and len(self._embeddings) <= MAX_KEPT) or len(self._embeddings) == 1:
                return
            if mm_hash not in self._holds and not embedding.shared.is_loading:
                del self._embeddings[mm_hash]
                self.nbytes -= embedding.nbytes
                embedding.shared.close()


def publish(name: str, published: PublishedEmbedding, timeout_s: float) -> None:
    """Returns when the scheduler of the engine ``name`` has mapped the embedding.

    Raises:
        TransportError: The scheduler does not reply in time, or could not map the embedding.
    """
    socket: zmq.Socket[bytes]
    with zmq.Context.instance().socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(_address(name))
        socket.send(msgspec.msgpack.encode(published))
        if not socket.poll(int(timeout_s * 1000)):
            raise TransportError(f"the scheduler has not taken an embedding within {timeout_s:g} s")
        problem = socket.recv()
    if problem:
        raise TransportError(f"the scheduler could not take an embedding: {problem.decode()}")


def _address(name: str) -> str:
    return f"ipc://@embferry-vllm-{name}"
