"""The producer in the scheduler: offers the embeddings that its workers made, and says where they are."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from embferry import (
    CapacityError,
    EmbeddingSender,
    EmbeddingTransferError,
    KVPoll,
    Layout,
    LeaseExpired,
    PeerGone,
    SendManager,
    as_fields,
)
from embferry.transfer.failures import as_transfer_error, attempt

from ..shared.counters import Counters
from ..shared.managers import Managers
from .claims import claim_room, consumer_of, content_number
from .config import ConnectorConfig
from .coordinates import Coordinates
from .offers import Content, KeptForClaim, Offers
from .producer_cache import CachedEmbedding, ProducerCache
from .workers import Workers

log = logging.getLogger(__name__)

SWEEP_S = 1.0
"""How often offers are looked at for the end of their lease, at most."""
MAX_REFUSALS = 256
"""Claims that are refused in the time for which a manager remembers a room. Others have no answer."""
MAX_EARLY_CLAIMS = 1024
EARLY_CLAIM_S = 3.0
"""How long a claim without an offer is remembered. Its consumer repeats it sooner, until it gives up."""


class Producer:
    """Sends the embeddings of one engine. The scheduler's thread calls the methods."""

    def __init__(self, config: ConnectorConfig, workers: Workers, counters: Counters) -> None:
        self._config, self._counters = config, counters
        self._managers: Managers[SendManager] = Managers(
            self._new_manager, counters, lambda manager: self.offers.end_all(manager)
        )
        self._held: dict[str, frozenset[str]] = {}  # hashes, by request
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()  # guards the four below
        self._is_sweeping = False
        self._refused_at: deque[float] = deque(maxlen=MAX_REFUSALS)
        self._rooms: dict[str, tuple[str, int]] = {}  # hash and room of an item to be offered, by request
        self._early_claims: OrderedDict[int, _EarlyClaim] = OrderedDict()  # by the number of an offer
        self._later = workers.later
        self.cache = ProducerCache(config.cache_bytes, config.max_embedding_bytes, counters, workers)
        self.cache.on_published = self._published
        self.offers = Offers(
            config.offered_bytes,
            config.max_offers,
            claim_timeout=config.claim_timeout,
            lease_timeout=config.lease_timeout,
            on_end=self._ended,
        )
        counters.add_gauge("offered_bytes", lambda: self.offers.nbytes)
        counters.add_gauge("kept_bytes", lambda: self.cache.nbytes)

    def hold(self, request: str, hashes: Collection[str], room: int | None = None) -> set[str]:
        """Keeps what the request needs until :meth:`release`. Returns the missing hashes: a worker may have them.

        Args:
            request: The request.
            hashes: Those of its items.
            room: In this room its item, if it has one alone, is offered as soon as it is here. A consumer may ask for
                it there before.
        """
        if request not in self._held:
            self._held[request] = frozenset(hashes)
            self.cache.hold(self._held[request])
            if room is not None and len(self._held[request]) == 1:
                (mm_hash,) = self._held[request]
                with self._lock:
                    self._rooms[request] = mm_hash, room
                if self.find(mm_hash) is not None:
                    self._published(mm_hash)
        return {mm_hash for mm_hash in self._held[request] if self.find(mm_hash) is None}

    def is_mapping(self, request: str) -> bool:
        """Returns whether a rank is still mapping an embedding that was held for the request and is in the cache."""
        return self.cache.is_mapping(self._held.get(request, frozenset()))

    def release(self, request: str) -> None:
        with self._lock:
            self._rooms.pop(request, None)
        self.cache.release(self._held.pop(request, frozenset()))

    def find(self, mm_hash: str) -> CachedEmbedding | None:
        """Returns an embedding that need not be encoded again."""
        # One whose offer ends between the first two looks is in the cache by then.
        return self.cache.find(mm_hash) or self.offers.find(mm_hash) or self.cache.find(mm_hash)

    def offer(self, mm_hash: str, room: int | None = None) -> dict[str, Any]:
        """Offers an embedding and returns its coordinates as plain data. Any number of consumers may fetch it.

        Args:
            mm_hash: vLLM's hash of the item.
            room: The number of the offer. None: that of its content, so the coordinates are the same each time.

        Raises:
            PeerGone: The embedding is not here.
            CapacityError: Too many bytes are offered and have not been fetched.
            LocalProtocolError: The room is used for another embedding.
            TransportError: No manager works.
        """
        cached = self.cache.find(mm_hash)
        embedding, number, manager = self._name(mm_hash, room, cached)
        digest, shape = embedding.digest, embedding.shared.shape
        found = [one for one in (embedding, cached) if one is not None]
        self._counters.add("items_offered")
        self._counters.add("encodes_saved", 0 if any(one.is_new for one in found) else 1)
        for one in found:
            one.is_new = False
        plain: dict[str, Any] = msgspec.to_builtins(Coordinates(manager.endpoint, number, *shape, digest.hex()))
        return plain

    def _name(
        self, mm_hash: str, room: int | None, cached: CachedEmbedding | None
    ) -> tuple[CachedEmbedding, int, SendManager]:
        """Opens an offer of an embedding, or renews it, and serves those that have asked for it already.

        Returns:
            The embedding, the number of the offer, and the manager at which consumers ask for it.

        Raises:
            as :meth:`offer`.
        """
        embedding = self.offers.find(mm_hash)  # the same one again, although it may be encoded a second time
        embedding = embedding or cached or self.cache.find(mm_hash)  # its offer may just have ended
        if embedding is None:
            raise PeerGone(f"the worker has not published the embedding {mm_hash}, or it was evicted; encode it again")
        digest = embedding.digest
        number = content_number(self._secret, mm_hash, digest) if room is None else room
        manager = self._managers.get(embedding.shared.shape.layout)
        if room is not None and self.offers.was_fetched(number, Content(mm_hash, digest)):
            return embedding, number, manager  # before the response that names it
        try:
            embedding = self.offers.name(embedding, number, manager)
        except CapacityError:
            if not self._end_silent():
                raise
            embedding = self.offers.name(embedding, number, manager)
        self._sweep_later()
        with self._lock:
            early = self._early_claims.pop(number, None)
        if early is not None and early.manager is manager and early.until >= time.monotonic():
            attempt(manager.run_callback, partial(self._requested, manager, early.room, early.name))
        return embedding, number, manager

    def _published(self, mm_hash: str) -> None:
        """Offers an embedding in the rooms of the requests for it, before they finish.

        Runs on the channel's thread or the scheduler's. It may not block. The response of the request has the error if
        the embedding cannot be offered.
        """
        with self._lock:
            rooms = {room for wanted, room in self._rooms.values() if wanted == mm_hash}
        for room in rooms:
            if (error := attempt(self._name, mm_hash, room, self.cache.find(mm_hash))) is not None:
                log.info("the embedding %s cannot be offered yet: %s", mm_hash, error)

    def close(self) -> None:
        self._managers.close()
        for manager in self.offers.sources():
            self.offers.end_all(manager)
        self.cache.close()

    # Claims. These run on the manager's callback thread without locks.

    def _requested(self, manager: SendManager, room: int, name: str) -> None:
        """Serves a consumer that asks for an offer in a room of its own, or in that of the coordinates.

        There may be no such offer yet: then the claim is remembered.
        """
        numbers = claim_room(room, name), room
        if not self._serve_claim(manager, room, name):
            until = time.monotonic() + EARLY_CLAIM_S
            with self._lock:
                self._early_claims |= dict.fromkeys(numbers, _EarlyClaim(manager, room, name, until))
                while len(self._early_claims) > MAX_EARLY_CLAIMS:
                    self._early_claims.popitem(last=False)
            if not self._serve_claim(manager, room, name):  # it may have been offered meanwhile
                return
        with self._lock:
            for number in numbers:
                self._early_claims.pop(number, None)

    def _serve_claim(self, manager: SendManager, room: int, name: str) -> bool:
        """Serves or refuses a consumer. Returns False if there is no offer for it."""
        for number, consumer in ((claim_room(room, name), consumer_of(name)), (room, None)):
            try:
                claim = self.offers.claim(number, room, manager, partial(self._cached, manager.layout), consumer)
            except EmbeddingTransferError as error:
                self._refuse(manager, room, error)
                return True
            if claim is not None:
                self._serve(manager, claim)
                for earlier in self.offers.earlier_claims(claim):
                    self._give_up(earlier, "its consumer has asked for it again")
                return True
        return False

    def _serve(self, manager: SendManager, claim: KeptForClaim) -> None:
        embedding = claim.embedding
        try:
            claim.sender = sender = manager.open(claim.room)
            sender.on_change(partial(self._changed, claim))
            sender.init(embedding.shared.shape.tokens, embedding.digest)
            sender.send_embedding(as_fields({"input_embeddings": embedding.shared.rows}))
            self._changed(claim)  # it may have ended before it could be watched
        except Exception as raised:  # noqa: BLE001  (fails this transfer alone)
            error = as_transfer_error("serving a consumer", raised, claim.room)
            log.error("room %d: cannot be served: %s", claim.room, error, extra={"room": claim.room})
            if claim.sender is None:
                self.offers.end_claim(claim, fetched=False)
            else:
                claim.sender.abort(error)

    def _give_up(self, claim: KeptForClaim, why: str) -> None:
        if claim.sender is not None:
            claim.sender.abort(LeaseExpired(f"this transfer was given up: {why}", room=claim.room))
            self._changed(claim)

    def _end_silent(self) -> bool:
        """Ends the claims of consumers that have been silent for ``claim_timeout``. Returns whether there were any."""
        silent = [claim for claim in self.offers.claims() if claim.sender is not None and self._is_silent(claim.sender)]
        for claim in silent:
            self._give_up(claim, "its consumer is silent and others need the memory")
        return bool(silent)

    def _is_silent(self, sender: EmbeddingSender) -> bool:
        """Returns whether no message has come from a consumer for ``claim_timeout``."""
        with sender.manager.lock:
            lease_ends = sender.machine.next_timeout()
            left = self._config.lease_timeout - self._config.claim_timeout
            return lease_ends is not None and lease_ends - left <= sender.manager.now()

    def _refuse(self, manager: SendManager, room: int, error: EmbeddingTransferError) -> None:
        now = time.monotonic()
        with self._lock:
            if len(self._refused_at) == MAX_REFUSALS and now - self._refused_at[0] < manager.settings.linger:
                return
            self._refused_at.append(now)
        attempt(lambda: manager.open(room).abort(error))

    def _changed(self, claim: KeptForClaim) -> None:
        """Ends a claim once its memory is not read any more.

        It may run after later events, so that an offer ends without any step of the engine. It may not block.
        """
        if claim.sender is not None and claim.sender.source_released:
            self.offers.end_claim(claim, fetched=_is_fetched(claim.sender))

    def _cached(self, layout: Layout, mm_hash: str) -> CachedEmbedding | None:
        found = self.cache.find(mm_hash)
        return found if found is not None and found.shared.shape.layout == layout else None

    # The end of offers

    def _ended(self, embedding: CachedEmbedding | None, outcome: str) -> None:
        """Runs with the lock of the offers held, before the offer is gone."""
        if embedding is not None:
            self.cache.put(embedding)
        self._counters.add("offers_ended", label=outcome)

    def _sweep_later(self) -> None:
        with self._lock:
            if self._is_sweeping:
                return
            self._is_sweeping = True
        self._later(min(SWEEP_S, self._config.lease_timeout / 2), self._sweep)

    def _sweep(self) -> None:
        """Looks for offers that have to end, until none is open. Runs on the channel's thread."""
        if (error := attempt(self._end_overdue)) is not None:
            log.error("offers could not be ended: %s", error, exc_info=error)
        with self._lock:
            self._is_sweeping = False
        if not self.offers.is_empty:
            self._sweep_later()

    def _end_overdue(self) -> None:
        """Ends the offers that have expired, or whose manager has failed."""
        for manager in self.offers.sources():
            if isinstance(manager, SendManager) and manager.fault is not None:
                self.offers.end_all(manager)
        self.offers.expire()

    def _new_manager(self, layout: Layout) -> SendManager:
        config = self._config
        manager = SendManager(
            layout,
            config.make_transports(),
            host=config.host,
            advertise=config.advertise,
            settings=config.sending,
            trust=config.trust,
        )
        manager.on_request(partial(self._requested, manager))
        return manager


@dataclass(frozen=True, slots=True)
class _EarlyClaim:
    """A consumer's request for an embedding that is not offered yet."""

    manager: SendManager
    room: int
    name: str
    until: float


def _is_fetched(sender: EmbeddingSender) -> bool:
    try:
        return sender.poll() is KVPoll.Success
    except EmbeddingTransferError:
        return False
