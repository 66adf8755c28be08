"""Transfers between producer and consumer of the vLLM connector, without vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from embferry import CapacityError, IntegrityError, LayoutMismatch, LocalProtocolError, PeerGone, RemoteProtocolError
from embferry.connectors.vllm.config import parse
from embferry.connectors.vllm.coordinates import KEY, coordinates_in, room_request_in

from .pair import (
    CONFIG,
    NBYTES,
    NOTICES_LOSS_S,
    NOTICES_LOSS_SOON_S,
    TOKENS,
    Encode,
    Language,
    Pair,
    until,
    with_peer_timeout,
)

pytestmark = pytest.mark.integration

ROOMY = msgspec.structs.replace(CONFIG, cache_bytes=2 * NBYTES)
"""The caches have room for two embeddings."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(ROOMY)
    yield made
    made.close()


@pytest.fixture
def pair_that_notices_loss() -> Iterator[Pair]:
    """A pair for rooms that do not exist: the producer stays silent about them."""
    made = Pair(with_peer_timeout(ROOMY, NOTICES_LOSS_S))
    yield made
    made.close()


def test_the_pool_may_be_smaller_than_the_embedding(pair: Pair) -> None:
    rows = pair.publish("a")
    assert np.array_equal(pair.fetch("r", "a", pair.offer("a")), rows)
    assert pair.count("resumed_transfers") >= TOKENS / (4 * 8) - 1
    assert pair.count("wire_bytes") == pair.count("embedding_bytes") == NBYTES
    assert pair.count("repeated_bytes") == 0


def test_a_second_request_finds_the_embedding_at_the_consumer(pair: Pair) -> None:
    rows = pair.publish("a")
    pair.fetch("r", "a", pair.offer("a"))
    pair.consumer.release("r")
    unreachable = msgspec.structs.replace(pair.offer("a"), endpoint="tcp://127.0.0.1:9")
    assert pair.consumer.require("s", "a", unreachable)
    assert np.array_equal(pair.rows("a"), rows)
    assert pair.count("cache_hits") == 1


def test_an_embedding_of_the_same_hash_must_have_the_same_shape(pair: Pair) -> None:
    pair.publish("a")
    coordinates = pair.offer("a")
    pair.fetch("r", "a", coordinates)
    with pytest.raises(LayoutMismatch):
        pair.consumer.require("s", "a", msgspec.structs.replace(coordinates, tokens=TOKENS - 1))


def test_the_producer_keeps_what_its_budget_allows(pair: Pair) -> None:
    for seed, name in enumerate("abc"):
        pair.publish(name, seed)
    with pytest.raises(PeerGone):
        pair.producer.offer("a")
    assert pair.producer.offer("b")["tokens"] == pair.producer.offer("c")["tokens"] == TOKENS


def test_an_offered_embedding_outlives_its_place_in_the_cache(pair: Pair) -> None:
    rows = pair.publish("a")
    coordinates = pair.offer("a")
    for seed, name in enumerate("bcd"):
        pair.publish(name, seed)
    assert pair.producer.cache.find("a") is None
    assert np.array_equal(pair.fetch("r", "a", coordinates), rows)


def test_an_offer_waits_longer_than_a_consumer_does() -> None:
    encode, language = Encode(with_peer_timeout(CONFIG, 0.2)), Language()
    try:
        rows = encode.publish("a")
        coordinates = encode.offer("a")
        time.sleep(0.6)  # three times what a consumer waits; more does no harm
        assert np.array_equal(language.fetch("r", "a", coordinates), rows)
    finally:
        encode.close()
        language.close()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"digest": "00" * 16}, IntegrityError),
        ({"tokens": TOKENS + 1}, RemoteProtocolError),
        ({"room": 7}, PeerGone),
    ],
)
def test_a_failure_has_a_code_and_the_next_request_succeeds(
    pair_that_notices_loss: Pair, changes: dict[str, object], error: type
) -> None:
    pair = pair_that_notices_loss
    rows = pair.publish("a")
    with pytest.raises(error):
        pair.fetch("r", "a", msgspec.structs.replace(pair.offer("a"), **changes))
    assert pair.consumer.find("a") is None
    assert np.array_equal(pair.fetch("s", "a", pair.offer("a")), rows)


def test_a_producer_that_has_ended_is_gone(pair: Pair) -> None:
    pair.publish("a")
    coordinates = pair.offer("a")
    language = Language(with_peer_timeout(CONFIG, NOTICES_LOSS_SOON_S))
    pair.producer.close()
    try:
        with pytest.raises(PeerGone):
            language.fetch("r", "a", coordinates)
    finally:
        language.close()


@pytest.mark.parametrize(
    "extra",
    [
        {"transports": ["pigeon"]},
        {"transports": []},
        {"num_blocks": 0},
        {"num_block": 8},
        {"block_size": "8"},
        {"offered_bytes": 0},
        {"peer_timeout": float("nan")},
        {"metrics_port": 65536},
        {"router": "ftp://10.0.0.1"},
        {"router": "http://10.0.0.1:port"},
        {"router": "http://10.0.0.1/ec"},
        {"router": "http://user@10.0.0.1"},
    ],
)
def test_invalid_settings_are_refused(extra: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError, match="ec_connector_extra_config"):
        parse(extra)


def test_invalid_coordinates_are_refused() -> None:
    assert coordinates_in(None) is None
    assert coordinates_in({"metadata": {}}) is None
    with pytest.raises(RemoteProtocolError):
        coordinates_in({KEY: {"endpoint": 7}})


GOOD = {"endpoint": "tcp://10.0.0.1:5", "room": 7, "tokens": 3, "width": 4, "dtype": "float32", "digest": "0" * 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"endpoint": "tcp://10.0.0.1:²"},
        {"endpoint": "tcp://\ud800:5"},
        {"endpoint": "tcp://10.0.0.1"},
        {"room": -1},
        {"room": 1 << 64},
        {"room": 7.0},
        {"tokens": -1},
        {"tokens": 0},
        {"tokens": 1 << 40},
        {"width": 0},
        {"width": 1 << 21},
        {"dtype": "d" * 33},
        {"dtype": 4},
        {"digest": "0" * 31},
        {"digest": "0" * 31 + "\n"},
        {"digest": "g" * 32},
        {"failover_token": "\ud800"},
    ],
    ids=repr,
)
def test_each_coordinate_is_checked_at_the_call(changes: dict[str, object]) -> None:
    assert coordinates_in({KEY: GOOD}) is not None
    with pytest.raises(RemoteProtocolError):
        coordinates_in({KEY: GOOD | changes})


def test_an_embedding_beyond_the_limit_is_refused_before_memory_is_asked_for(pair: Pair) -> None:
    pair.publish("a")
    huge = msgspec.structs.replace(pair.offer("a"), tokens=1 << 39)
    with pytest.raises(CapacityError, match="max_embedding_bytes"):
        pair.consumer.require("r", "a", huge)
    assert pair.consumer.find("a") is None


@pytest.mark.parametrize("request_", [{"room": -1}, {"room": 1 << 63}, {"room": "7"}, {}, {"room": 7, "more": 1}, 7])
def test_invalid_room_requests_are_refused(request_: object) -> None:
    with pytest.raises(RemoteProtocolError):
        room_request_in({KEY: request_})


def test_a_room_request_is_optional() -> None:
    assert room_request_in(None) is None
    assert room_request_in({}) is None
    found = room_request_in({KEY: {"room": (1 << 63) - 1}})
    assert found is not None
    assert found.room == (1 << 63) - 1


def test_a_failover_token_has_a_maximum_length(pair: Pair) -> None:
    pair.publish("a")
    assert pair.offer("a", token="t" * 128).failover_token == "t" * 128
    with pytest.raises(RemoteProtocolError):
        pair.offer("a", token="t" * 129)


def test_an_embedding_that_a_rank_may_still_map_is_not_evicted(pair: Pair) -> None:
    """Neither when its request is aborted, nor when the budget is full."""
    rows = pair.publish("a")
    pair.fetch("r", "a", pair.offer("a"))
    shared = pair.consumer.find("a")
    assert shared is not None
    number = shared.begin_load()
    pair.consumer.release("r")
    for name in "bc":
        pair.publish(name)
        pair.fetch(name, name, pair.offer(name))
        pair.consumer.release(name)
    mapped = pair.rank.find(shared.key)
    assert np.array_equal(mapped.rows, rows)
    mapped.completed[0] = number
    pair.fetch("s", "b", pair.offer("b"))
    pair.consumer.release("s")
    assert pair.consumer.find("a") is None
    assert not shared.is_open
    until(lambda: shared.key not in pair.rank._mapped)


def test_a_request_is_not_failed_by_the_room_of_another_one(pair_that_notices_loss: Pair) -> None:
    pair = pair_that_notices_loss
    rows = pair.publish("a")
    good = pair.offer("a")
    bad = msgspec.structs.replace(good, room=7)
    assert not pair.consumer.require("first", "a", bad)
    assert np.array_equal(pair.fetch("second", "a", good), rows)
    assert pair.consumer.require("first", "a", bad)


def test_requests_whose_rooms_are_all_gone_all_fail(pair_that_notices_loss: Pair) -> None:
    pair = pair_that_notices_loss
    pair.publish("a")
    rooms = [msgspec.structs.replace(pair.offer("a"), room=room) for room in (7, 8)]
    failed: list[int] = []

    def all_have_failed() -> bool:
        for number, coordinates in enumerate(rooms):
            if number not in failed:
                try:
                    assert not pair.consumer.require(str(number), "a", coordinates)
                except PeerGone:
                    failed.append(number)
        return len(failed) == len(rooms)

    until(all_have_failed)
