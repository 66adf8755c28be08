"""Embeddings that a consumer asks for before they are encoded: coordinates without a digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import msgspec
import numpy as np
import pytest

from embferry import CapacityError, EmbeddingTransferError, IntegrityError, LayoutMismatch, RemoteProtocolError
from embferry.connectors.shared.shape import digest_of
from embferry.connectors.shared.shared_rows import SharedRows
from embferry.connectors.vllm import producer as producer_module
from embferry.connectors.vllm.channel import Publish, publish
from embferry.connectors.vllm.coordinates import KEY, Coordinates, coordinates_in

from .pair import CONFIG, GUARD_S, NOTICES_LOSS_S, SHAPE, TOKENS, Encode, Pair, rows_like, until
from .routed import TOKEN, Routed, answer

pytestmark = pytest.mark.integration

ROOM = 4711


@pytest.fixture
def pair() -> Iterator[Pair]:
    with closing(Pair(CONFIG)) as made:
        yield made


def awaited(encode: Encode, room: int = ROOM, token: str | None = None) -> Coordinates:
    """Returns coordinates of an embedding that will be encoded. The producer has offered another one before."""
    encode.publish("earlier", 99)
    earlier = encode.offer("earlier")
    return msgspec.structs.replace(earlier, room=room, digest=None, failover_token=token)


def test_an_embedding_arrives_that_was_asked_for_before_it_is_encoded(pair: Pair) -> None:
    coordinates = awaited(pair)
    assert not pair.consumer.require("r", "a", coordinates)
    until(lambda: pair.producer._early_claims)
    pair.producer.hold("encode", ["a"], ROOM)
    rows = pair.publish("a")
    assert np.array_equal(pair.fetch("r", "a", coordinates), rows), "the encode's request has not finished"
    assert pair.produced("items_offered") == 1, "only the earlier one was in a response"
    assert pair.count("repeated_bytes") == 0


def test_the_order_of_the_two_requests_and_the_encode_does_not_matter(pair: Pair) -> None:
    coordinates = awaited(pair)
    pair.producer.hold("encode", ["a"], ROOM)
    rows = pair.publish("a")
    assert np.array_equal(pair.fetch("r", "a", coordinates), rows)
    later = msgspec.structs.replace(coordinates, room=ROOM + 1)
    assert not pair.consumer.require("s", "b", later)
    pair.publish("b", 1)
    until(lambda: pair.producer._early_claims)
    pair.producer.hold("encode of b", ["b"], ROOM + 1)  # it is in the cache
    assert np.array_equal(pair.fetch("s", "b", later), rows_like(1))


def test_the_response_names_an_embedding_that_was_fetched_and_does_not_keep_it(pair: Pair) -> None:
    coordinates = awaited(pair)
    pair.producer.hold("encode", ["a"], ROOM)
    pair.publish("a")
    pair.fetch("r", "a", coordinates)
    until(lambda: pair.produced("offers_ended", "fetched"))
    kept = pair.producer.offers.nbytes
    named = pair.offer("a", ROOM)
    assert named == msgspec.structs.replace(coordinates, digest=digest_of(rows_like(0), SHAPE).hex())
    assert pair.producer.offers.nbytes == kept
    pair.consumer.release("r")
    pair.consumer._drop("a", "")
    assert np.array_equal(pair.fetch("s", "a", named), rows_like(0)), "it can be fetched again"


def test_the_response_offers_an_embedding_that_was_not_fetched(pair: Pair) -> None:
    pair.producer.hold("encode", ["a"], ROOM)
    pair.publish("a")
    pair.producer.release("encode")
    assert np.array_equal(pair.fetch("r", "a", pair.offer("a", ROOM)), rows_like(0))


def test_one_item_of_several_is_not_offered_in_the_room(pair: Pair) -> None:
    pair.producer.hold("encode", ["a", "b"], ROOM)
    pair.publish("a")
    assert pair.producer.offers.is_empty


def test_nothing_is_offered_for_a_request_that_has_ended(pair: Pair) -> None:
    pair.producer.hold("encode", ["a"], ROOM)
    pair.producer.release("encode")
    pair.publish("a")
    assert pair.producer.offers.is_empty


def test_bytes_that_are_not_the_announced_ones_are_refused(pair: Pair) -> None:
    coordinates = awaited(pair)
    pair.producer.hold("encode", ["a"], ROOM)
    with closing(SharedRows.make(SHAPE, ranks=1)) as shared:
        np.copyto(shared.rows, rows_like(0))
        publish(pair.name, Publish("a", SHAPE, digest_of(rows_like(1), SHAPE)), shared.fd, GUARD_S)
    with pytest.raises(IntegrityError):
        pair.fetch("r", "a", coordinates)


@pytest.mark.parametrize("tokens", [TOKENS - 1, TOKENS + 1])
def test_another_length_than_the_prompt_has_room_for_is_refused(pair: Pair, tokens: int) -> None:
    coordinates = msgspec.structs.replace(awaited(pair), tokens=tokens)
    pair.producer.hold("encode", ["a"], ROOM)
    pair.publish("a")
    with pytest.raises(RemoteProtocolError if tokens > TOKENS else CapacityError):
        pair.fetch("r", "a", coordinates)


def test_a_request_that_ends_meanwhile_is_not_served(pair: Pair) -> None:
    coordinates = awaited(pair)
    pair.consumer.require("r", "a", coordinates)
    until(lambda: pair.producer._early_claims)
    pair.consumer.release("r")
    assert pair.count("transfers", "aborted") == 1
    assert "a" not in pair.consumer._embeddings


def test_claims_without_an_offer_are_few(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer of one that was dropped asks again."""
    monkeypatch.setattr(producer_module, "MAX_EARLY_CLAIMS", 2)
    coordinates = awaited(pair)
    names = [f"item {number}" for number in range(3)]
    for number, name in enumerate(names):
        pair.consumer.require("r", name, msgspec.structs.replace(coordinates, room=number))
    until(lambda: pair.producer._early_claims)
    for number, name in enumerate(names):
        pair.producer.hold(name, [name], number)
        pair.publish(name, number)
    for number, name in enumerate(names):
        rows = pair.fetch("r", name, msgspec.structs.replace(coordinates, room=number))
        assert np.array_equal(rows, rows_like(number))
        with pair.producer._lock:
            assert len(pair.producer._early_claims) <= 2


def test_two_requests_share_one_transfer(pair: Pair) -> None:
    coordinates = awaited(pair)
    assert not pair.consumer.require("r", "a", coordinates)
    pair.producer.hold("encode", ["a"], ROOM)
    pair.publish("a")
    named = pair.offer("a", ROOM)
    pair.fetch("s", "a", named)
    assert pair.consumer.require("r", "a", coordinates)
    assert pair.count("transfers", "success") == 1


def test_an_offer_takes_the_place_of_coordinates_without_one(pair: Pair) -> None:
    """Such as after an encode that failed, and succeeded elsewhere: the first request may not have ended here yet."""
    coordinates = awaited(pair)
    assert not pair.consumer.require("r", "a", coordinates)
    pair.publish("a")
    assert np.array_equal(pair.fetch("s", "a", pair.offer("a", ROOM + 1)), rows_like(0))
    assert pair.consumer.require("r", "a", coordinates)
    assert pair.count("transfers", "success") == 1


def test_coordinates_of_a_request_that_is_left_are_used_when_the_first_has_ended(pair: Pair) -> None:
    """No producer offers the room of the first, if two requests for one item were announced."""
    coordinates = awaited(pair)
    second = msgspec.structs.replace(coordinates, room=ROOM + 1)
    assert not pair.consumer.require("r", "a", coordinates)
    assert not pair.consumer.require("s", "a", second)
    assert pair.consumer._embeddings["a"].coordinates.room == ROOM
    pair.producer.hold("encode", ["a"], ROOM + 1)
    pair.publish("a")
    pair.consumer.release("r")
    assert np.array_equal(pair.fetch("s", "a", second), rows_like(0))


@pytest.mark.parametrize("is_offered", [True, False])
def test_an_embedding_that_is_here_or_on_its_way_does_not_give_way(pair: Pair, is_offered: bool) -> None:
    pair.publish("a")
    pair.fetch("r", "a", pair.offer("a"))
    known = pair.consumer._embeddings["a"]
    other = pair.offer("a", ROOM + 1)
    if not is_offered:
        other = msgspec.structs.replace(other, tokens=TOKENS, digest=None)
    assert pair.consumer.require("s", "a", other)
    assert pair.consumer._embeddings["a"] is known


def test_another_producer_takes_over_if_the_first_is_lost_before_it_has_encoded(
    make_routed: Callable[..., Routed],
) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    coordinates = awaited(routed.first, token=TOKEN)
    routed.stub.failover = lambda token, body: routed.at_second(ROOM)
    assert not routed.language.consumer.require("r", "a", coordinates)
    until(lambda: routed.first.producer._early_claims)
    routed.first.producer.close()
    assert np.array_equal(routed.language.fetch("r", "a", coordinates), rows_like(0))
    assert [body["endpoint"] for _, body in routed.stub.failovers()] == [coordinates.endpoint]


def test_after_a_failover_the_digest_of_the_router_counts(make_routed: Callable[..., Routed]) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    coordinates = awaited(routed.first, token=TOKEN)

    def wrong(token: str, body: object) -> tuple[int, object]:
        routed.second.publish("a")
        offered = routed.second.offer("a", ROOM, TOKEN)
        return answer(msgspec.structs.replace(offered, digest="0" * 32))

    routed.stub.failover = wrong
    assert not routed.language.consumer.require("r", "a", coordinates)
    until(lambda: routed.first.producer._early_claims)
    routed.first.producer.close()
    with pytest.raises(EmbeddingTransferError, match="not the announced one"):
        routed.language.fetch("r", "a", coordinates)


def test_coordinates_take_the_tokens_of_the_prompt() -> None:
    plain = {
        "endpoint": "tcp://127.0.0.1:1",
        "room": 1,
        "tokens": None,
        "width": 64,
        "dtype": "float32",
        "digest": None,
    }
    found = coordinates_in({KEY: plain})
    assert found is not None
    assert found.is_awaited
    assert found.at_prompt(48, "float32", 64).shape == (48, 64, "float32")
    with pytest.raises(LayoutMismatch):
        found.at_prompt(48, "bfloat16", 64)
    with pytest.raises(RemoteProtocolError):
        coordinates_in({KEY: plain | {"digest": "0" * 32}})
