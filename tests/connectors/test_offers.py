"""What a producer promises: within its budget, kept while it is promised, and given up without a worker's step."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from embferry.connectors.vllm.coordinates import refusal
from embferry.protocol.errors import CapacityError, LeaseExpired, LocalProtocolError

from .pair import CONFIG, NBYTES, TOKENS, Pair, until

pytestmark = pytest.mark.integration

TIGHT = msgspec.structs.replace(CONFIG, cache_bytes=NBYTES, offered_bytes=2 * NBYTES)
"""One embedding is kept, two may be promised."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(TIGHT)
    yield made
    made.close()


def promised(pair: Pair) -> int:
    return pair.producer.offers.nbytes // NBYTES


def test_a_full_budget_refuses_and_says_why(pair: Pair) -> None:
    for seed, name in enumerate("ab"):
        pair.publish(name, seed)
        pair.where(name)
    pair.publish("c", 2)
    with pytest.raises(CapacityError, match="raise offered_bytes") as caught:
        pair.producer.offer("c")
    assert refusal(caught.value)["code"] == "capacity_exhausted"
    assert "promised and not fetched" in refusal(caught.value)["message"]


def test_nothing_that_is_promised_is_dropped(pair: Pair) -> None:
    rows = {name: pair.publish(name, seed) for seed, name in enumerate("a")}
    where = {"a": pair.where("a")}
    rows["b"] = pair.publish("b", 1)
    where["b"] = pair.where("b")
    for seed in range(2, 5):
        pair.publish(f"other {seed}", seed)
    for name in "ab":
        assert np.array_equal(pair.fetch(name, name, where[name]), rows[name])


def test_an_embedding_counts_once(pair: Pair) -> None:
    pair.publish("a")
    rooms = [pair.where("a") for _ in range(5)]
    assert promised(pair) == 1
    pair.publish("b", 1)
    pair.where("b")
    assert pair.where("a").tokens == TOKENS  # full, but nothing new
    for where in rooms:
        pair.consumer.finished("r")
        pair.fetch("r", "a", where)
    assert promised(pair) == 2  # one room is left of it


def test_what_is_fetched_makes_room_and_is_kept_for_the_next(pair: Pair) -> None:
    pair.publish("a")
    where = pair.where("a")
    pair.publish("b", 1)  # for which there is no place beside it on the shelf
    assert pair.producer.shelf.find("a") is None
    pair.fetch("r", "a", where)
    until(lambda: promised(pair) == 0)
    assert pair.producer.shelf.find("a") is not None
    assert pair.where("a").tokens == TOKENS


def test_what_nobody_fetches_ends_by_itself() -> None:
    pair = Pair(msgspec.structs.replace(TIGHT, lease_timeout=0.2))
    try:
        pair.publish("a")
        where = pair.where("a")
        assert promised(pair) == 1
        until(lambda: promised(pair) == 0)
        assert pair.made.read().counts["offers_ended", "unfetched"] == 1
        with pytest.raises(LeaseExpired, match="no language worker has opened"):
            pair.fetch("r", "a", where)
    finally:
        pair.close()


def test_a_room_is_taken_from_the_request(pair: Pair) -> None:
    rows = pair.publish("a")
    where = pair.where("a", room=77)
    assert where.room == 77
    assert pair.where("a", room=77) == where  # asked again, for its answer was lost
    assert np.array_equal(pair.fetch("r", "a", where), rows)


def test_a_room_that_is_in_use_for_something_else_is_refused(pair: Pair) -> None:
    pair.publish("a")
    pair.where("a", room=77)
    pair.publish("b", 1)
    with pytest.raises(LocalProtocolError, match="in use"):
        pair.producer.offer("b", 77)
    assert promised(pair) == 1


def test_a_room_that_has_ended_can_be_opened_again(pair: Pair) -> None:
    pair.publish("a")
    pair.fetch("r", "a", pair.where("a", room=77))
    until(lambda: promised(pair) == 0)
    pair.consumer.close()
    rows = pair.publish("b", 1)
    other = Pair(TIGHT)
    try:
        assert np.array_equal(other.fetch("r", "b", pair.where("b", room=77)), rows)
    finally:
        other.close()


def test_what_a_running_request_needs_is_not_given_up(pair: Pair) -> None:
    assert pair.producer.needs("r", ["a", "b"]) == {"a", "b"}
    for seed, name in enumerate("abc"):
        pair.publish(name, seed)
    assert pair.producer.needs("r", ["a", "b"]) == set()
    pair.producer.finished("r")
    left = [name for name in "abc" if pair.producer.shelf.find(name)]
    assert len(left) == 1  # as many as the budget allows


def test_encodes_that_were_saved(pair: Pair) -> None:
    pair.publish("a")
    for _ in range(3):
        pair.where("a")
    pair.publish("b", 1, encoded=False)  # from vLLM's own cache
    pair.where("b")
    counts = pair.made.read().counts
    assert (counts["items_encoded", ""], counts["items_offered", ""], counts["encodes_saved", ""]) == (1, 4, 3)
