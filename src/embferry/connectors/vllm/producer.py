"""The producer in the scheduler: offers the embeddings that its workers made, and says where they are."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from embferry import (
    CapacityError,
    EmbeddingSender,
    EmbeddingTransferError,
    KVPoll,
    Layout,
    PeerGone,
    SendManager,
    as_fields,
)

from .config import ConnectorConfig
from .coordinates import Coordinates
from .counters import Counters
from .producer_cache import CachedEmbedding, ProducerCache

OUTCOMES = {KVPoll.Success: "fetched", KVPoll.Failed: "unfetched"}
"""Label of ``offers_ended`` by the final status of a room."""

Name = tuple[str, bytes]
"""Hash and digest. An embedding that is encoded again may differ in its last bits; then it is another one."""


class Offers:
    """The offered embeddings that have not been fetched, within a budget. Any thread may call the methods.

    An offered embedding is never evicted. It ends with the last room in which it is offered.
    """

    def __init__(self, budget: int, on_end: Callable[[CachedEmbedding], None]) -> None:
        """``budget`` is in bytes. ``on_end`` runs on the thread that ended the last room, without the lock."""
        self._budget, self._on_end = budget, on_end
        self._offered: dict[Name, tuple[CachedEmbedding, set[int]]] = {}
        self.nbytes = 0
        self._lock = threading.Lock()

    def find(self, mm_hash: str) -> CachedEmbedding | None:
        with self._lock:
            return next((found for (known, _), (found, _) in self._offered.items() if known == mm_hash), None)

    def begin(self, embedding: CachedEmbedding, room: int) -> CachedEmbedding:
        """Returns the embedding to send in the room: of equal content, the one that was offered first.

        Raises:
            CapacityError: The embedding is not offered yet, and exceeds the budget together with those that are.
        """
        name = (embedding.mm_hash, embedding.digest)
        with self._lock:
            offered, rooms = self._offered.get(name, (embedding, set()))
            if not rooms:
                if self.nbytes + offered.nbytes > self._budget:
                    why = f"{self.nbytes} of {self._budget} bytes are offered and not fetched"
                    raise CapacityError(f"{why}; ask another producer, ask later, or raise offered_bytes")
                self._offered[name] = (offered, rooms)
                self.nbytes += offered.nbytes
            rooms.add(room)
            return offered

    def end(self, embedding: CachedEmbedding, room: int) -> None:
        """Ends the offer in a room: it was fetched, aborted, or has expired. Does nothing if it has ended already."""
        name = (embedding.mm_hash, embedding.digest)
        with self._lock:
            offered, rooms = self._offered.get(name, (embedding, set()))
            if room not in rooms:
                return
            rooms.remove(room)
            if rooms:
                return
            del self._offered[name]
            self.nbytes -= offered.nbytes
        self._on_end(offered)


class Producer:
    """Sends the embeddings of one engine. There is one manager for each layout of its encoders, nearly always one."""

    def __init__(self, config: ConnectorConfig, name: str, counters: Counters) -> None:
        self._config, self._counters = config, counters
        self._managers: dict[Layout, SendManager] = {}
        self._held: dict[str, frozenset[str]] = {}  # hashes, by request
        self._rooms: dict[int, tuple[EmbeddingSender, Coordinates]] = {}
        self.cache = ProducerCache(name, config.cache_bytes, counters)
        self.offers = Offers(config.offered_bytes, self.cache.put)
        counters.add_gauge("offered_bytes", lambda: self.offers.nbytes)
        counters.add_gauge("kept_bytes", lambda: self.cache.nbytes)

    def hold(self, request: str, hashes: Iterable[str]) -> set[str]:
        """Keeps what the request needs until :meth:`release`. Returns the missing hashes: a worker may have them."""
        if request not in self._held:
            self._held[request] = frozenset(hashes)
            self.cache.hold(self._held[request])
        return {mm_hash for mm_hash in self._held[request] if self.find(mm_hash) is None}

    def release(self, request: str) -> None:
        self.cache.release(self._held.pop(request, frozenset()))

    def find(self, mm_hash: str) -> CachedEmbedding | None:
        """Returns an embedding that need not be encoded again."""
        return self.cache.find(mm_hash) or self.offers.find(mm_hash)

    def offer(self, mm_hash: str, room: int | None = None) -> dict[str, Any]:
        """Offers an embedding, to be fetched once, and returns its coordinates as plain data.

        Args:
            mm_hash: vLLM's hash of the item.
            room: The room to offer it in, or None for a new one. An open offer of the same content is returned again.

        Raises:
            PeerGone: The embedding is not here.
            CapacityError: Too many bytes are offered and have not been fetched.
            LocalProtocolError: The room is used for another embedding.
        """
        embedding = self.find(mm_hash)
        if embedding is None:
            raise PeerGone(f"the worker has not published the embedding {mm_hash}, or it was evicted; encode it again")
        coordinates = self._offered(embedding, room)
        if coordinates is None:
            coordinates = self._open(embedding, secrets.randbits(63) if room is None else room)
        self._counters.add("items_offered")
        self._counters.add("encodes_saved", 0 if embedding.is_new else 1)
        embedding.is_new = False
        plain: dict[str, Any] = msgspec.to_builtins(coordinates)
        return plain

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
        self.cache.close()

    def _offered(self, embedding: CachedEmbedding, room: int | None) -> Coordinates | None:
        """Returns the coordinates of an open offer of this embedding in the room."""
        if room is None or room not in self._rooms:
            return None
        sender, coordinates = self._rooms[room]
        if sender.poll() in OUTCOMES or coordinates.digest != embedding.digest.hex():
            return None  # SendManager.open() decides whether the room can be opened again
        return coordinates

    def _open(self, embedding: CachedEmbedding, room: int) -> Coordinates:
        digest, shape = embedding.digest, embedding.shared.handle.shape
        manager = self._manager(shape.layout)
        embedding = self.offers.begin(embedding, room)
        try:
            sender = manager.open(room)
        except EmbeddingTransferError:
            self.offers.end(embedding, room)
            raise
        coordinates = Coordinates(manager.endpoint, room, *shape, digest.hex())
        self._rooms[room] = (sender, coordinates)
        sender.on_change(lambda: self._changed(sender, embedding))
        sender.init(shape.tokens, digest)
        sender.send_embedding(as_fields({"input_embeddings": embedding.shared.rows}))
        return coordinates

    def _changed(self, sender: EmbeddingSender, embedding: CachedEmbedding) -> None:
        """Ends the offer once its memory is not read any more.

        Runs on the manager's driver thread with the manager's lock held, so that an offer ends without any step of the
        engine. It may not block.
        """
        if not sender.source_released:
            return
        known = self._rooms.get(sender.room)
        if known is not None and known[0] is sender:
            self._rooms.pop(sender.room, None)
            self._counters.add("offers_ended", label=OUTCOMES[sender.machine.poll()])
        self.offers.end(embedding, sender.room)

    def _manager(self, layout: Layout) -> SendManager:
        if layout not in self._managers:
            config = self._config
            self._managers[layout] = SendManager(
                layout, config.make_transports(), host=config.host, advertise=config.advertise, settings=config.sending
            )
        return self._managers[layout]
