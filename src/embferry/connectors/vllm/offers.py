"""A producer's offers: which embeddings are kept until a consumer has fetched them, and for how long.

An offer names one content by a number. The embedding is kept from the time at which a response names the offer until
the last consumer that asked for it has ended, or until the lease is over. Then it goes to the producer's cache. While
it is there, it can still be fetched by the same number.
"""

from __future__ import annotations

import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from embferry import CapacityError, EmbeddingSender, LeaseExpired, LocalProtocolError

from .producer_cache import CachedEmbedding


class Content(NamedTuple):
    """Hash and digest. An embedding that is encoded again may differ in its last bits; then it is another one."""

    mm_hash: str
    digest: bytes


@dataclass(eq=False, slots=True)
class _Kept:
    """An embedding that is kept, and the numbers of its offers."""

    embedding: CachedEmbedding
    numbers: set[int] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class _Offer:
    """An open offer.

    Attributes:
        source: The manager at which consumers ask for it.
        until: The end of the lease; of no meaning while there are claims.
        awaited_since: When it was named first since a consumer asked for it last; None: not named since.
        claims: Those of consumers that are fetching it, by room.
        was_fetched: Whether one of them has fetched it.
    """

    number: int
    content: Content
    source: object
    until: float
    awaited_since: float | None = None
    claims: dict[int, KeptForClaim] = field(default_factory=dict)
    was_fetched: bool = False


@dataclass(eq=False, slots=True)
class KeptForClaim:
    """An embedding that is kept for one consumer, from :meth:`Offers.claim` to :meth:`Offers.end_claim`.

    Attributes:
        embedding: The embedding.
        room: The room in which the consumer fetches it.
        source: The manager at which it does.
        consumer: Its name; None: it has none.
        sender: The end that sends to it; None: not yet.
    """

    embedding: CachedEmbedding
    room: int
    source: object
    offer: _Offer = field(repr=False)
    consumer: str | None = None
    sender: EmbeddingSender | None = None


class Offers:
    """The open offers, within bounds. Any thread may call the methods.

    An embedding counts once, however many offers name it. When a bound is reached, an offer for which no consumer has
    asked for ``claim_timeout`` gives way, the one that waits longest first: its coordinates may have been lost, or its
    consumer may have the embedding already.
    """

    def __init__(
        self,
        budget: int,
        most: int,
        *,
        claim_timeout: float,
        lease_timeout: float,
        on_end: Callable[[CachedEmbedding | None, str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``budget`` is in bytes. ``most`` is the number of offers and, separately, of claims, which have rooms.

        ``on_end(embedding, outcome)`` is called for each offer that ends, with the lock held, on the thread that ends
        it. It takes the embedding into the cache while the offer is still there, so that it is in one of them at any
        time. The embedding is None if another offer keeps it. Outcomes are fetched, unfetched and displaced.
        """
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = most if files < 0 else min(most, max(1, files // 4))  # each may hold a descriptor
        self._budget, self._on_end, self._clock = budget, on_end, clock
        self._claim_timeout, self._lease_timeout = claim_timeout, lease_timeout
        self._lock = threading.Lock()  # guards everything below
        self._open: OrderedDict[int, _Offer] = OrderedDict()  # in the order of awaited_since
        self._kept: dict[str, dict[bytes, _Kept]] = {}
        self._ended: OrderedDict[int, Content] = OrderedDict()  # the latest
        self._fetched: OrderedDict[int, Content] = OrderedDict()  # those of them that a consumer has fetched
        self._claims = 0
        self.nbytes = 0

    def find(self, mm_hash: str) -> CachedEmbedding | None:
        with self._lock:
            return next((kept.embedding for kept in self._kept.get(mm_hash, {}).values()), None)

    def name(self, embedding: CachedEmbedding, number: int, source: object) -> CachedEmbedding:
        """Opens the offer ``number`` of this content, or renews its lease: a response names it.

        Returns:
            The embedding that is kept: of equal content, the one that was offered first.

        Raises:
            LocalProtocolError: The number is that of an open offer of another content.
            CapacityError: There are too many offers, or they have too many bytes.
        """
        content = Content(embedding.mm_hash, embedding.digest)
        with self._lock:
            now = self._clock()
            offer = self._open.get(number)
            if offer is None:
                offer = self._begin(content, embedding, number, source, now)
            elif offer.content != content:
                raise LocalProtocolError("the room is in use for another embedding; draw another", room=number)
            offer.source, offer.until = source, now + self._lease_timeout
            if offer.awaited_since is None:
                offer.awaited_since = now
                self._open.move_to_end(number)
            return self._kept[content.mm_hash][content.digest].embedding

    def was_fetched(self, number: int, content: Content) -> bool:
        """Returns whether the offer ``number`` of this content has ended because its consumers have fetched it."""
        with self._lock:
            return self._fetched.get(number) == content

    def claim(
        self,
        number: int,
        room: int,
        source: object,
        cached: Callable[[str], CachedEmbedding | None],
        consumer: str | None = None,
    ) -> KeptForClaim | None:
        """Keeps the embedding of an offer for a consumer that asks for it in ``room``.

        Args:
            number: The offer's.
            room: The claim's.
            source: The manager at which the consumer asks.
            cached: Finds an embedding in the cache by its hash: an offer that has ended is opened again with it.
            consumer: The consumer's name; None: it has none.

        Returns:
            None if no offer at this manager has the number, or the room has a claim already.

        Raises:
            LeaseExpired: The offer has ended, and the cache has its content no longer.
            CapacityError: There are too many claims or offers, or they have too many bytes.
        """
        with self._lock:
            offer, content = self._open.get(number), self._ended.get(number)
            if offer is None and content is None:
                return None
            if offer is not None and (offer.source is not source or room in offer.claims):
                return None
            if self._claims >= self._most:
                raise CapacityError(f"{self._most} consumers are fetching, the most here", room=room)
            if offer is None:
                assert content is not None
                embedding = cached(content.mm_hash)
                if embedding is None or embedding.digest != content.digest:
                    raise LeaseExpired("the offer has ended and was not kept; encode it again", room=room)
                offer = self._begin(content, embedding, number, source, self._clock())
            kept = self._kept[offer.content.mm_hash][offer.content.digest]
            claim = offer.claims[room] = KeptForClaim(kept.embedding, room, source, offer, consumer)
            self._claims += 1
            offer.awaited_since = None
            return claim

    def end_claim(self, claim: KeptForClaim, *, fetched: bool) -> None:
        """A claim has ended, and its consumer's transfer does not read the memory any more. Idempotent."""
        offer = claim.offer
        with self._lock:
            if offer.claims.get(claim.room) is not claim:
                return
            del offer.claims[claim.room]
            self._claims -= 1
            offer.was_fetched |= fetched
            if not offer.claims and offer.awaited_since is None:
                self._end(offer)

    def claims(self) -> list[KeptForClaim]:
        with self._lock:
            return [claim for offer in self._open.values() for claim in offer.claims.values()]

    def earlier_claims(self, claim: KeptForClaim) -> list[KeptForClaim]:
        """Returns the other claims of the same offer by the same consumer."""
        with self._lock:
            others = [other for other in claim.offer.claims.values() if other is not claim]
        return [other for other in others if other.consumer is not None and other.consumer == claim.consumer]

    def expire(self) -> None:
        """Ends the offers whose lease is over."""
        with self._lock:
            now = self._clock()
            for offer in [offer for offer in self._open.values() if not offer.claims and offer.until <= now]:
                self._end(offer)

    def end_all(self, source: object) -> None:
        """Ends the offers and the claims at a manager that has failed."""
        with self._lock:
            for offer in list(self._open.values()):
                for claim in [claim for claim in offer.claims.values() if claim.source is source]:
                    del offer.claims[claim.room]
                    self._claims -= 1
                if not offer.claims and (offer.source is source or offer.awaited_since is None):
                    self._end(offer)

    @property
    def is_empty(self) -> bool:
        return not self._open

    def sources(self) -> set[object]:
        """Returns all sources of open offers."""
        with self._lock:
            return {offer.source for offer in self._open.values()}

    # With the lock

    def _begin(self, content: Content, embedding: CachedEmbedding, number: int, source: object, now: float) -> _Offer:
        """Opens an offer, and ends those that have to give way for it."""
        for displaced in self._displaced(content, embedding.nbytes, now):
            self._end(displaced, "displaced")
        kept = self._kept.setdefault(content.mm_hash, {}).get(content.digest)
        if kept is None:
            kept = self._kept[content.mm_hash][content.digest] = _Kept(embedding)
            self.nbytes += embedding.nbytes
        kept.numbers.add(number)
        self._ended.pop(number, None)
        self._fetched.pop(number, None)
        offer = self._open[number] = _Offer(number, content, source, now + self._lease_timeout)
        return offer

    def _displaced(self, content: Content, nbytes: int, now: float) -> list[_Offer]:
        """Returns the offers that have to give way for one more, of this content.

        Raises:
            CapacityError: Not enough of them may.
        """
        found: list[_Offer] = []
        gone: dict[Content, int] = {}
        freed, old = 0, iter(self._open.values())
        is_kept = content.digest in self._kept.get(content.mm_hash, {})
        while True:
            too_many = len(self._open) - len(found) >= self._most
            too_large = not is_kept and self.nbytes - freed + nbytes > self._budget
            if not too_many and not too_large:
                return found
            offer = next((one for one in old if self._may_be_displaced(one, now) and one.content != content), None)
            if offer is None:
                raise self._full(too_many)
            found.append(offer)
            gone[offer.content] = gone.get(offer.content, 0) + 1
            kept = self._kept[offer.content.mm_hash][offer.content.digest]
            freed += kept.embedding.nbytes if gone[offer.content] == len(kept.numbers) else 0

    def _may_be_displaced(self, offer: _Offer, now: float) -> bool:
        return not offer.claims and offer.awaited_since is not None and offer.awaited_since + self._claim_timeout <= now

    def _full(self, too_many: bool) -> CapacityError:
        """Returns an error in words that do not change: proxies compare two answers for one picture."""
        what = f"{self._most} offers" if too_many else f"{self._budget} bytes"
        setting = "max_offers or the limit on open files" if too_many else "offered_bytes"
        return CapacityError(
            f"at most {what} may be offered and not fetched; ask another producer, ask later, or raise {setting}"
        )

    def _end(self, offer: _Offer, outcome: str | None = None) -> None:
        """Removes an offer without claims."""
        outcome = outcome or ("fetched" if offer.was_fetched else "unfetched")
        by_digest = self._kept[offer.content.mm_hash]
        kept = by_digest[offer.content.digest]
        self._on_end(kept.embedding if kept.numbers == {offer.number} else None, outcome)
        del self._open[offer.number]
        self._ended[offer.number] = offer.content
        if outcome == "fetched":
            self._fetched[offer.number] = offer.content
        if len(self._ended) > self._most:
            self._fetched.pop(self._ended.popitem(last=False)[0], None)
        kept.numbers.remove(offer.number)
        if kept.numbers:
            return
        del by_digest[offer.content.digest]
        if not by_digest:
            del self._kept[offer.content.mm_hash]
        self.nbytes -= kept.embedding.nbytes
