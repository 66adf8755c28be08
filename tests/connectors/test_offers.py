"""A producer's offers: within a budget, kept until they end, and ended without a worker's step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import msgspec
import numpy as np
import pytest

from embferry import CapacityError, LeaseExpired, LocalProtocolError
from embferry.connectors.vllm.producer_cache import CachedEmbedding

from .pair import CONFIG, NBYTES, TOKENS, Language, Pair, until

pytestmark = pytest.mark.integration

TIGHT = msgspec.structs.replace(CONFIG, cache_bytes=NBYTES, offered_bytes=2 * NBYTES)
"""The cache has room for one embedding, and two may be offered."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(TIGHT)
    yield made
    made.close()


def offered(pair: Pair) -> int:
    return pair.producer.offers.nbytes // NBYTES


def test_an_offer_beyond_the_budget_is_refused_with_a_reason(pair: Pair) -> None:
    for seed, name in enumerate("ab"):
        pair.publish(name, seed)
        pair.offer(name)
    pair.publish("c", 2)
    with pytest.raises(CapacityError, match="offered_bytes"):
        pair.producer.offer("c")


def test_offered_embeddings_are_never_evicted(pair: Pair) -> None:
    rows, coordinates = {}, {}
    for seed, name in enumerate("ab"):
        rows[name] = pair.publish(name, seed)
        coordinates[name] = pair.offer(name)
    for seed in range(2, 5):
        pair.publish(f"other {seed}", seed)
    for name in "ab":
        assert np.array_equal(pair.fetch(name, name, coordinates[name]), rows[name])


def test_an_embedding_in_several_offers_counts_once(pair: Pair) -> None:
    pair.publish("a")
    rooms = [pair.offer("a", room) for room in (None, 71, 72, 73, None)]
    assert offered(pair) == 1
    pair.publish("b", 1)
    pair.offer("b")
    assert pair.offer("a", room=74).tokens == TOKENS, "the budget is full, but this adds nothing"
    for coordinates in rooms[:-1]:
        pair.consumer.release("r")
        pair.fetch("r", "a", coordinates)
    assert offered(pair) == 2, "one offer of it is left"


def test_a_fetched_embedding_returns_to_the_cache(pair: Pair) -> None:
    pair.publish("a")
    coordinates = pair.offer("a")
    pair.publish("b", 1)
    assert pair.producer.cache.find("a") is None, "the cache has room for one"
    pair.fetch("r", "a", coordinates)
    until(lambda: offered(pair) == 0)
    assert pair.producer.cache.find("a") is not None
    assert pair.offer("a").tokens == TOKENS


def test_an_offer_that_is_not_fetched_expires(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pair.publish("a")
    coordinates = pair.offer("a")
    with monkeypatch.context() as patch:
        patch.setattr(pair.producer.offers, "_clock", lambda: time.monotonic() + TIGHT.lease_timeout)
        until(lambda: offered(pair) == 0)
    assert pair.produced("offers_ended", "unfetched") == 1
    assert np.array_equal(pair.fetch("r", "a", coordinates), rows), "it is in the cache"
    until(lambda: offered(pair) == 0)
    pair.consumer.release("r")
    pair.publish("b", 1)
    with closing(Language(TIGHT)) as other, pytest.raises(LeaseExpired):
        other.fetch("s", "a", coordinates)


def test_an_embedding_whose_offer_ends_meanwhile_is_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler looks into the cache, the offer ends on another thread, and the scheduler looks at the offers."""
    pair.publish("a")
    pair.offer("a")
    pair.publish("b", 1)
    assert pair.producer.cache.find("a") is None, "the cache has room for one"
    find = pair.producer.offers.find

    def find_after_the_end(mm_hash: str) -> CachedEmbedding | None:
        pair.producer.offers.end_all(next(iter(pair.producer.offers.sources())))
        return find(mm_hash)

    with monkeypatch.context() as patch:
        patch.setattr(pair.producer.offers, "find", find_after_the_end)
        assert pair.producer.find("a") is not None
    pair.offer("a")
    pair.publish("b", 1)
    monkeypatch.setattr(pair.producer.offers, "find", find_after_the_end)
    assert pair.offer("a").tokens == TOKENS


def test_a_request_may_name_the_room(pair: Pair) -> None:
    rows = pair.publish("a")
    coordinates = pair.offer("a", room=77)
    assert coordinates.room == 77
    assert pair.offer("a", room=77) == coordinates, "the request may be repeated if its response was lost"
    assert np.array_equal(pair.fetch("r", "a", coordinates), rows)


def test_a_room_that_offers_another_embedding_is_refused(pair: Pair) -> None:
    pair.publish("a")
    pair.offer("a", room=77)
    pair.publish("b", 1)
    with pytest.raises(LocalProtocolError):
        pair.producer.offer("b", 77)
    assert offered(pair) == 1


def test_a_room_that_has_ended_can_be_opened_again(pair: Pair) -> None:
    pair.publish("a")
    pair.fetch("r", "a", pair.offer("a", room=77))
    until(lambda: offered(pair) == 0)
    pair.consumer.close()
    rows = pair.publish("b", 1)
    other = Pair(TIGHT)
    try:
        assert np.array_equal(other.fetch("r", "b", pair.offer("b", room=77)), rows)
    finally:
        other.close()


def test_embeddings_of_a_running_request_are_not_evicted(pair: Pair) -> None:
    assert pair.producer.hold("r", ["a", "b"]) == {"a", "b"}
    for seed, name in enumerate("abc"):
        pair.publish(name, seed)
    assert pair.producer.hold("r", ["a", "b"]) == set()
    pair.producer.release("r")
    assert len([name for name in "abc" if pair.producer.cache.find(name)]) == 1, "as many as the budget allows"


def test_offers_without_a_new_encode_are_counted_as_saved(pair: Pair) -> None:
    pair.publish("a")
    for _ in range(3):
        pair.offer("a")
    pair.publish("b", 1, encoded=False)  # from vLLM's encoder cache
    pair.offer("b")
    assert [pair.produced(name) for name in ("items_encoded", "items_offered", "encodes_saved")] == [1, 4, 3]
