"""Producer and consumer of the vLLM connector without vLLM: what they do with the bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from embferry.connectors.vllm.config import parse
from embferry.connectors.vllm.coordinates import KEY, coordinates_in, wish_in
from embferry.connectors.vllm.shared import attach
from embferry.protocol.errors import (
    IntegrityError,
    LayoutMismatch,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
)

from .pair import CONFIG, NBYTES, TOKENS, Pair, until

pytestmark = pytest.mark.integration

ROOMY = msgspec.structs.replace(CONFIG, cache_bytes=2 * NBYTES)
"""Two embeddings fit."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(ROOMY)
    yield made
    made.close()


def test_through_a_pool_smaller_than_the_embedding(pair: Pair) -> None:
    rows = pair.publish("a")
    assert np.array_equal(pair.fetch("r", "a", pair.where("a")), rows)
    assert pair.count("resumed_transfers") >= TOKENS / (4 * 8) - 1
    assert pair.count("wire_bytes") == pair.count("embedding_bytes") == NBYTES
    assert pair.count("bytes_sent_twice") == 0


def test_a_second_request_finds_it_here(pair: Pair) -> None:
    rows = pair.publish("a")
    pair.fetch("r", "a", pair.where("a"))
    pair.consumer.finished("r")
    nowhere = msgspec.structs.replace(pair.where("a"), endpoint="tcp://127.0.0.1:9")
    assert pair.consumer.want("s", "a", nowhere)
    assert np.array_equal(pair.rows("a"), rows)
    assert pair.count("cache_hits") == 1


def test_another_content_under_the_same_name_must_have_the_same_shape(pair: Pair) -> None:
    pair.publish("a")
    where = pair.where("a")
    pair.fetch("r", "a", where)
    with pytest.raises(LayoutMismatch):
        pair.consumer.want("s", "a", msgspec.structs.replace(where, tokens=TOKENS - 1))


def test_the_producer_keeps_what_its_budget_allows(pair: Pair) -> None:
    for seed, name in enumerate("abc"):
        pair.publish(name, seed)
    with pytest.raises(PeerGone, match="encode it again"):
        pair.producer.offer("a")
    assert pair.producer.offer("b")["tokens"] == pair.producer.offer("c")["tokens"] == TOKENS


def test_a_room_that_is_offered_outlives_the_shelf(pair: Pair) -> None:
    rows = pair.publish("a")
    where = pair.where("a")
    for seed, name in enumerate("bcd"):
        pair.publish(name, seed)
    assert pair.producer.shelf.find("a") is None
    assert np.array_equal(pair.fetch("r", "a", where), rows)


def test_an_offer_waits_longer_than_a_consumer_does(pair: Pair) -> None:
    rows = pair.publish("a")
    where = pair.where("a")
    time.sleep(3 * CONFIG.peer_timeout)  # it is time itself that must do no harm
    assert np.array_equal(pair.fetch("r", "a", where), rows)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"digest": "00" * 16}, IntegrityError),
        ({"tokens": TOKENS + 1}, RemoteProtocolError),
        ({"room": 7}, PeerGone),
    ],
)
def test_what_cannot_be_had_says_why_and_leaves_nothing(pair: Pair, changes: dict[str, object], error: type) -> None:
    rows = pair.publish("a")
    with pytest.raises(error):
        pair.fetch("r", "a", msgspec.structs.replace(pair.where("a"), **changes))
    assert not pair.consumer.is_here("a")
    assert np.array_equal(pair.fetch("s", "a", pair.where("a")), rows)


def test_a_producer_that_has_ended(pair: Pair) -> None:
    pair.publish("a")
    where = pair.where("a")
    other = Pair(CONFIG)
    pair.producer.close()
    try:
        began = time.monotonic()
        with pytest.raises(PeerGone):
            other.fetch("r", "a", where)
        assert time.monotonic() - began < 2
    finally:
        other.close()


@pytest.mark.parametrize(
    "extra",
    [
        {"transports": ["pigeon"]},
        {"transports": []},
        {"num_blocks": 0},
        {"num_block": 8},
        {"block_size": "8"},
        {"offered_bytes": 0},
        {"metrics_port": 65536},
        {"router": "ftp://10.0.0.1"},
        {"router": "http://10.0.0.1:port"},
        {"router": "http://10.0.0.1/ec"},
        {"router": "http://somebody@10.0.0.1"},
    ],
)
def test_settings_that_cannot_be(extra: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError, match="ec_connector_extra_config"):
        parse(extra)


def test_parameters_that_cannot_be() -> None:
    assert coordinates_in(None) is None
    assert coordinates_in({"metadata": {}}) is None
    with pytest.raises(RemoteProtocolError, match="malformed"):
        coordinates_in({KEY: {"endpoint": 7}})


@pytest.mark.parametrize("wish", [{"room": -1}, {"room": 1 << 63}, {"room": "7"}, {}, {"room": 7, "more": 1}, 7])
def test_wishes_that_cannot_be(wish: object) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        wish_in({KEY: wish})


def test_a_wish() -> None:
    assert wish_in(None) is None
    assert wish_in({}) is None
    found = wish_in({KEY: {"room": (1 << 63) - 1}})
    assert found is not None
    assert found.room == (1 << 63) - 1


def test_a_token_has_a_longest_length(pair: Pair) -> None:
    pair.publish("a")
    assert pair.where("a", token="t" * 128).replacement == "t" * 128
    with pytest.raises(RemoteProtocolError, match="malformed"):
        pair.where("a", token="t" * 129)


def test_what_a_rank_may_still_map_stays(pair: Pair) -> None:
    """Though its request was aborted, and the budget is full."""
    rows = pair.publish("a")
    pair.fetch("r", "a", pair.where("a"))
    shared = pair.consumer.load("a").shared
    assert shared is not None
    number = shared.lend()
    pair.consumer.finished("r")
    for name in "bc":
        pair.publish(name)
        pair.fetch(name, name, pair.where(name))
        pair.consumer.finished(name)
    memory = attach(shared.place)
    assert np.array_equal(memory.rows, rows)
    memory.marks[0] = number
    pair.fetch("s", "b", pair.where("b"))
    pair.consumer.finished("s")
    assert not pair.consumer.is_here("a")
    with pytest.raises(OSError, match="No such file"):
        attach(shared.place)


def test_a_request_is_not_failed_by_the_room_of_another_one(pair: Pair) -> None:
    rows = pair.publish("a")
    good = pair.where("a")
    bad = msgspec.structs.replace(good, room=7)
    assert not pair.consumer.want("first", "a", bad)
    assert np.array_equal(pair.fetch("second", "a", good), rows)
    assert pair.consumer.want("first", "a", bad)


def test_several_requests_whose_rooms_are_all_gone_fail_all(pair: Pair) -> None:
    pair.publish("a")
    rooms = [msgspec.structs.replace(pair.where("a"), room=room) for room in (7, 8)]
    failed: list[int] = []

    def all_have_failed() -> bool:
        for number, where in enumerate(rooms):
            if number not in failed:
                try:
                    assert not pair.consumer.want(str(number), "a", where)
                except PeerGone:
                    failed.append(number)
        return len(failed) == len(rooms)

    until(all_have_failed)
