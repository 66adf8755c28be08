"""The producer in the scheduler: offers the embeddings that its workers made, and says where they are."""

from __future__ import annotations

import itertools
import resource
import secrets
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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

from ..shared.counters import Counters
from ..shared.managers import Managers
from .config import ConnectorConfig
from .coordinates import Coordinates
from .producer_cache import CachedEmbedding, ProducerCache
from .workers import Workers

Name = tuple[str, bytes]
"""Hash and digest. An embedding that is encoded again may differ in its last bits; then it is another one."""


class Offer(NamedTuple):
    """An open offer: the end that sends it, where it is, and what it is.

    Attributes:
        number: Identifies the offer; a room may be used again.
    """

    sender: EmbeddingSender
    coordinates: Coordinates
    embedding: CachedEmbedding
    number: int


class Offers:
    """The offered embeddings that have not been fetched, within a budget. Any thread may call the methods.

    An offered embedding is never evicted. It ends with the last of its offers, each of which has a number.
    """

    def __init__(self, budget: int, most: int, on_end: Callable[[CachedEmbedding], None]) -> None:
        """``budget`` is in bytes, ``most`` the number of offers: each may hold a file descriptor, and has a room.

        ``on_end`` runs on the thread that ended the last offer, without the lock.
        """
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = most if files < 0 else min(most, max(1, files // 4))
        self._budget, self._on_end = budget, on_end
        self._count = 0
        self._offered: dict[Name, tuple[CachedEmbedding, set[int]]] = {}
        self.nbytes = 0
        self._lock = threading.Lock()

    def find(self, mm_hash: str) -> CachedEmbedding | None:
        with self._lock:
            return next((found for (known, _), (found, _) in self._offered.items() if known == mm_hash), None)

    def begin(self, embedding: CachedEmbedding, number: int) -> CachedEmbedding:
        """Returns the embedding to send in the offer: of equal content, the one that was offered first.

        Raises:
            CapacityError: There are too many offers, or the embedding is not offered yet and exceeds the budget
                together with those that are.
        """
        name = (embedding.mm_hash, embedding.digest)
        with self._lock:
            if self._count >= self._most:
                why = f"{self._count} offers are open and not fetched, the most here"
                what = "max_offers or the limit on open files"
                raise CapacityError(f"{why}; ask another producer, ask later, or raise {what}")
            offered, numbers = self._offered.get(name, (embedding, set()))
            if not numbers:
                if self.nbytes + offered.nbytes > self._budget:
                    why = f"{self.nbytes} of {self._budget} bytes are offered and not fetched"
                    raise CapacityError(f"{why}; ask another producer, ask later, or raise offered_bytes")
                self._offered[name] = (offered, numbers)
                self.nbytes += offered.nbytes
            numbers.add(number)
            self._count += 1
            return offered

    def end(self, embedding: CachedEmbedding, number: int) -> bool:
        """Ends an offer: it was fetched, aborted, or has expired. Returns False if it had ended already."""
        name = (embedding.mm_hash, embedding.digest)
        with self._lock:
            offered, numbers = self._offered.get(name, (embedding, set()))
            if number not in numbers:
                return False
            numbers.remove(number)
            self._count -= 1
            if numbers:
                return True
            del self._offered[name]
            self.nbytes -= offered.nbytes
        self._on_end(offered)
        return True


class Producer:
    """Sends the embeddings of one engine. The scheduler's thread calls the methods."""

    def __init__(self, config: ConnectorConfig, workers: Workers, counters: Counters) -> None:
        self._config, self._counters = config, counters
        self._managers: Managers[SendManager] = Managers(self._new_manager, counters, self._end_all)
        self._held: dict[str, frozenset[str]] = {}  # hashes, by request
        self._lock = threading.Lock()  # guards the rooms
        self._rooms: dict[int, Offer] = {}
        self._numbers = itertools.count(1)
        self.cache = ProducerCache(config.cache_bytes, config.max_embedding_bytes, counters, workers)
        self.offers = Offers(config.offered_bytes, config.max_offers, self.cache.put)
        counters.add_gauge("offered_bytes", lambda: self.offers.nbytes)
        counters.add_gauge("kept_bytes", lambda: self.cache.nbytes)

    def hold(self, request: str, hashes: Iterable[str]) -> set[str]:
        """Keeps what the request needs until :meth:`release`. Returns the missing hashes: a worker may have them."""
        if request not in self._held:
            self._held[request] = frozenset(hashes)
            self.cache.hold(self._held[request])
        return {mm_hash for mm_hash in self._held[request] if self.find(mm_hash) is None}

    def is_mapping(self, request: str) -> bool:
        """Returns whether a rank is still mapping an embedding that was held for the request and is in the cache."""
        return self.cache.is_mapping(self._held.get(request, frozenset()))

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
            TransportError: No manager works.
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
        self._managers.close()
        self.cache.close()

    def _offered(self, embedding: CachedEmbedding, room: int | None) -> Coordinates | None:
        """Returns the coordinates of an open offer of this embedding in the room."""
        with self._lock:
            offer = None if room is None else self._rooms.get(room)
        if offer is None or offer.embedding.digest != embedding.digest or _has_ended(offer.sender):
            return None  # SendManager.open() decides whether the room can be opened again
        return offer.coordinates

    def _open(self, embedding: CachedEmbedding, room: int) -> Coordinates:
        digest, shape = embedding.digest, embedding.shared.shape
        manager = self._managers.get(shape.layout)
        number = next(self._numbers)
        embedding = self.offers.begin(embedding, number)
        try:
            sender = manager.open(room)
        except BaseException:
            self.offers.end(embedding, number)
            raise
        offer = Offer(sender, Coordinates(manager.endpoint, room, *shape, digest.hex()), embedding, number)
        with self._lock:
            self._rooms[room] = offer
        sender.on_change(lambda: self._changed(offer))
        try:
            sender.init(shape.tokens, digest)
            sender.send_embedding(as_fields({"input_embeddings": embedding.shared.rows}))
        except BaseException:
            sender.abort()
            raise
        return offer.coordinates

    def _changed(self, offer: Offer) -> None:
        """Ends the offer once its memory is not read any more.

        Runs on the manager's callback thread without locks, possibly after later events, so that an offer ends without
        any step of the engine. It may not block.
        """
        if offer.sender.source_released:
            self._end(offer)

    def _end(self, offer: Offer) -> None:
        with self._lock:
            if self._rooms.get(offer.sender.room) is offer:
                del self._rooms[offer.sender.room]
        if self.offers.end(offer.embedding, offer.number):
            self._counters.add("offers_ended", label="fetched" if _is_fetched(offer.sender) else "unfetched")

    def _end_all(self, manager: SendManager) -> None:
        """Ends the offers of a manager that had failed and is closed now. Runs on a thread of its own."""
        with self._lock:
            offers = [offer for offer in self._rooms.values() if offer.sender.manager is manager]
        for offer in offers:
            self._end(offer)

    def _new_manager(self, layout: Layout) -> SendManager:
        config = self._config
        return SendManager(
            layout,
            config.make_transports(),
            host=config.host,
            advertise=config.advertise,
            settings=config.sending,
            trust=config.trust,
        )


def _is_fetched(sender: EmbeddingSender) -> bool:
    try:
        return sender.poll() is KVPoll.Success
    except EmbeddingTransferError:
        return False


def _has_ended(sender: EmbeddingSender) -> bool:
    """Returns whether a room is of no use any more, also because its manager has failed."""
    try:
        return sender.poll() in (KVPoll.Success, KVPoll.Failed)
    except EmbeddingTransferError:
        return True
