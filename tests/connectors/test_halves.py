"""Producer and consumer of the vLLM connector without vLLM: what they do with the bytes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from embferry.connectors.vllm.config import ConnectorConfig, parse
from embferry.connectors.vllm.consumer import Consumer
from embferry.connectors.vllm.coordinates import KEY, Coordinates, coordinates_in, digest_of
from embferry.connectors.vllm.producer import Producer
from embferry.connectors.vllm.shared import SharedRows, attach
from embferry.connectors.vllm.shelf import Item, ToShelf
from embferry.disaggregation.protocol.errors import (
    IntegrityError,
    LayoutMismatch,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
)

pytestmark = pytest.mark.integration

WIDTH, DTYPE, TOKENS = 64, "float32", 300
CONFIG = ConnectorConfig(transports=("shm",), num_blocks=4, block_size=8, peer_timeout=0.5)
ROOMY = msgspec.structs.replace(CONFIG, cache_bytes=2 * TOKENS * WIDTH * 4)
"""Two embeddings fit."""

Rows = npt.NDArray[np.uint8]


class Pair:
    def __init__(self, config: ConnectorConfig) -> None:
        name = uuid.uuid4().hex
        self.producer, self.consumer = Producer(config, name), Consumer(config)
        self.worker = ToShelf(name, timeout=5)

    def publish(self, mm_hash: str, seed: int = 0) -> Rows:
        """As a worker does; answers the bytes."""
        rows = np.random.default_rng(seed).integers(0, 255, (TOKENS, WIDTH * 4), dtype=np.uint8)
        shared = SharedRows(*rows.shape)
        np.copyto(shared.rows, rows)
        self.worker.put(Item(mm_hash, shared.place, DTYPE, WIDTH, digest_of(shared.rows, DTYPE, WIDTH)))
        shared.close()
        return rows

    def where(self, mm_hash: str) -> Coordinates:
        found = coordinates_in({KEY: self.producer.offer(mm_hash)})
        assert found is not None
        return found

    def fetch(self, request: str, mm_hash: str, where: Coordinates) -> Rows:
        deadline = time.monotonic() + 5
        while not self.consumer.want(request, mm_hash, where):
            assert time.monotonic() < deadline
            time.sleep(0.001)  # as the engine's loop does between two steps
        return attach(self.consumer.load(mm_hash).place)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(ROOMY)
    yield made
    made.consumer.close()
    made.producer.close()


def test_through_a_pool_smaller_than_the_embedding(pair: Pair) -> None:
    rows = pair.publish("a")
    assert np.array_equal(pair.fetch("r", "a", pair.where("a")), rows)
    assert pair.consumer.load("a").transfers >= TOKENS / (4 * 8)


def test_a_second_request_finds_it_here(pair: Pair) -> None:
    rows = pair.publish("a")
    pair.fetch("r", "a", pair.where("a"))
    pair.consumer.finished("r")
    nowhere = msgspec.structs.replace(pair.where("a"), endpoint="tcp://127.0.0.1:9")
    assert pair.consumer.want("s", "a", nowhere)
    assert np.array_equal(attach(pair.consumer.load("a").place), rows)


def test_another_content_under_the_same_name_must_have_the_same_shape(pair: Pair) -> None:
    pair.publish("a")
    where = pair.where("a")
    pair.fetch("r", "a", where)
    with pytest.raises(LayoutMismatch):
        pair.consumer.want("s", "a", msgspec.structs.replace(where, tokens=TOKENS - 1))


def test_the_producer_keeps_what_its_budget_allows(pair: Pair) -> None:
    for seed, name in enumerate("abc"):
        pair.publish(name, seed)
    assert pair.producer.offer("a") is None
    assert pair.producer.offer("b") is not None
    assert pair.producer.offer("c") is not None


def test_a_room_that_is_offered_outlives_the_shelf(pair: Pair) -> None:
    rows = pair.publish("a")
    where = pair.where("a")
    for seed, name in enumerate("bcd"):
        pair.publish(name, seed)
    assert pair.producer.offer("a") is None
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
        other.consumer.close()
        other.producer.close()


@pytest.mark.parametrize(
    "extra", [{"transports": ["pigeon"]}, {"transports": []}, {"num_blocks": 0}, {"num_block": 8}, {"block_size": "8"}]
)
def test_settings_that_cannot_be(extra: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError, match="ec_connector_extra_config"):
        parse(extra)


def test_parameters_that_cannot_be() -> None:
    assert coordinates_in(None) is None
    assert coordinates_in({"metadata": {}}) is None
    with pytest.raises(RemoteProtocolError, match="malformed"):
        coordinates_in({KEY: {"endpoint": 7}})
