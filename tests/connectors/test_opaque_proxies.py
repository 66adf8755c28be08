"""Proxies that know nothing of rooms: they merge what producers answer by hash, and pass it on to any consumer.

The rules are those of llm-d. Its coordinator sends each picture of a request to an encoder, also the same one twice. It
drops empty entries, and refuses a request if two answers for one hash differ in anything. Its sidecar takes the later
answer instead.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import (
    CapacityError,
    EmbeddingTransferError,
    GatherSink,
    Geometry,
    KVPoll,
    LeaseExpired,
    PeerGone,
    ReceiveManager,
    as_fields,
)
from embferry.connectors.shared.transports import make_transports
from embferry.connectors.vllm.coordinates import KEY, REFUSED, Coordinates, coordinates_in
from embferry.testing.proxy import ChaosProxy

from .pair import CONFIG, NBYTES, NOTICES_LOSS_S, SHAPE, Encode, Language, rows_like, until

pytestmark = pytest.mark.integration

TIGHT = msgspec.structs.replace(CONFIG, cache_bytes=NBYTES, offered_bytes=2 * NBYTES)
"""The cache has room for one embedding, and two may be offered."""
Params = dict[str, Any]
"""``ec_transfer_params``: entries by hash."""


class ConflictError(Exception):
    """Two answers for one hash differ."""


class Encoder(Encode):
    """A producer that answers requests as vLLM does."""

    def answer(self, mm_hash: str, seed: int = 0) -> Params:
        """Encodes a picture unless it is here, and returns the answer's parameters."""
        if self.producer.hold("a request", [mm_hash]):
            self.publish(mm_hash, seed)
        entry: Params = {"item_indices": [0], "metadata": {"image_grid_thw": [[1, 30, 40]]}}
        try:
            entry[KEY] = self.producer.offer(mm_hash)
        except EmbeddingTransferError as error:
            entry[REFUSED] = {"code": error.code, "message": error.detail}
        finally:
            self.producer.release("a request")
        return {mm_hash: entry}

    @property
    def offered(self) -> int:
        return self.producer.offers.nbytes // NBYTES


def coordinator(answers: Iterable[Params]) -> Params:
    """Returns what llm-d's coordinator sends to the consumer."""
    params: Params = {}
    for mm_hash, entry in itertools.chain.from_iterable(answer.items() for answer in answers):
        if entry is None:
            continue
        if json.dumps(params.setdefault(mm_hash, entry), sort_keys=True) != json.dumps(entry, sort_keys=True):
            raise ConflictError(mm_hash)
    return params


def sidecar(answers: Iterable[Params]) -> Params:
    """Returns what llm-d's sidecar sends to the consumer."""
    return dict(itertools.chain.from_iterable(answer.items() for answer in answers))


def coordinates(params: Params, mm_hash: str) -> Coordinates:
    found = coordinates_in(json.loads(json.dumps(params[mm_hash])))
    assert found is not None
    return found


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


@pytest.fixture
def encoder(stack: ExitStack) -> Encoder:
    return stack.enter_context(closing(Encoder(TIGHT)))


def languages(stack: ExitStack, count: int) -> list[Language]:
    return [stack.enter_context(closing(Language(TIGHT))) for _ in range(count)]


def test_the_same_picture_several_times_in_a_request_is_one_offer(stack: ExitStack, encoder: Encoder) -> None:
    (language,) = languages(stack, 1)
    for seed in range(10):
        mm_hash = f"picture {seed}"
        params = coordinator(encoder.answer(mm_hash, seed) for _ in range(3))
        assert encoder.offered == 1
        assert np.array_equal(language.fetch(mm_hash, mm_hash, coordinates(params, mm_hash)), rows_like(seed))
        until(lambda: encoder.offered == 0)
    assert encoder.produced("offers_ended", "fetched") == 10
    assert encoder.produced("offers_ended", "unfetched") == 0


def test_an_embedding_has_one_descriptor_before_and_after_it_is_fetched(stack: ExitStack, encoder: Encoder) -> None:
    (language,) = languages(stack, 1)
    answers = [encoder.answer("a")]
    language.fetch("r", "a", coordinates(answers[0], "a"))
    until(lambda: encoder.offered == 0)
    answers.append(encoder.answer("a"))
    encoder.withdraw("a")
    answers.append(encoder.answer("a"))  # encoded again, with the same result
    assert coordinator(answers) == answers[0]


def test_an_offer_outlives_a_second_encode_that_differs(stack: ExitStack, encoder: Encoder) -> None:
    """As long as the first result is offered, it is the one that is named."""
    (language,) = languages(stack, 1)
    first = encoder.answer("a", seed=1)
    encoder.publish("a", seed=2)
    params = coordinator([first, encoder.answer("a")])
    assert np.array_equal(language.fetch("r", "a", coordinates(params, "a")), rows_like(1))


def test_several_consumers_fetch_one_offer_at_once(stack: ExitStack, encoder: Encoder) -> None:
    params = coordinator([encoder.answer("a")])
    there = coordinates(params, "a")
    consumers = languages(stack, 6)
    for language in consumers:
        language.consumer.require("r", "a", there)  # all have begun before one of them is polled again
    until(lambda: all(language.consumer.require("r", "a", there) for language in consumers))
    for language in consumers:
        assert np.array_equal(language.rows("a"), rows_like(0))
        assert (language.count("transfers", "success"), language.count("repeated_bytes")) == (1, 0)
    until(lambda: encoder.offered == 0)
    assert encoder.produced("offers_ended", "fetched") <= len(consumers)


def test_several_consumers_fetch_one_offer_one_after_another(stack: ExitStack, encoder: Encoder) -> None:
    there = coordinates(encoder.answer("a"), "a")
    for language in languages(stack, 3):
        assert np.array_equal(language.fetch("r", "a", there), rows_like(0))
        until(lambda: encoder.offered == 0)
    assert encoder.producer.offers.nbytes == 0


def test_a_consumer_that_gives_up_does_not_disturb_another(stack: ExitStack, encoder: Encoder) -> None:
    there = coordinates(encoder.answer("a"), "a")
    leaves, stays = languages(stack, 2)
    leaves.consumer.require("r", "a", there)
    stays.consumer.require("r", "a", there)
    leaves.consumer.release("r")
    assert np.array_equal(stays.fetch("r", "a", there), rows_like(0))
    until(lambda: encoder.offered == 0)


def test_a_consumer_that_has_asked_and_left_leaves_no_offer(stack: ExitStack, encoder: Encoder) -> None:
    there = coordinates(encoder.answer("a"), "a")
    (language,) = languages(stack, 1)
    language.consumer.require("r", "a", there)
    until(lambda: encoder.producer.offers._claims)
    language.consumer.release("r")
    until(lambda: encoder.offered == 0)


def test_the_coordinator_refuses_one_picture_of_two_encoders(stack: ExitStack, encoder: Encoder) -> None:
    """No connector can help it: two encoders have two addresses. The proxy has to send a picture to one of them."""
    other = stack.enter_context(closing(Encoder(TIGHT)))
    with pytest.raises(ConflictError):
        coordinator([encoder.answer("a"), other.answer("a")])


@pytest.mark.parametrize("merge", [sidecar, lambda answers: sidecar(reversed(list(answers)))], ids=["later", "earlier"])
def test_overwritten_entries_do_not_use_up_the_encoders(stack: ExitStack, merge: Any) -> None:
    """Two encoders have each picture, and one of them is never asked for it. Its offers give way to new ones."""
    hasty = msgspec.structs.replace(TIGHT, claim_timeout=1e-9)
    encoders = [stack.enter_context(closing(Encoder(hasty))) for _ in range(2)]
    (language,) = languages(stack, 1)
    for seed in range(12):
        mm_hash = f"picture {seed}"
        params = merge(one.answer(mm_hash, seed) for one in encoders)
        assert np.array_equal(language.fetch(mm_hash, mm_hash, coordinates(params, mm_hash)), rows_like(seed))
        language.consumer.release(mm_hash)
        assert all(one.offered <= 2 for one in encoders)
    lost = [one.produced("offers_ended", "displaced") for one in encoders]
    assert sorted(lost) == [0, 10]


def test_answers_that_no_consumer_uses_are_refused_before_they_may_give_way(encoder: Encoder) -> None:
    """Two refusals of one picture are equal, too."""
    for seed, mm_hash in enumerate("ab"):
        assert KEY in encoder.answer(mm_hash, seed)[mm_hash]
    first = encoder.answer("c", 2)
    assert first["c"][REFUSED]["code"] == "capacity_exhausted"
    assert coordinator([first, encoder.answer("c")]) == first
    assert KEY in encoder.answer("a")["a"], "it is offered already"


def test_claims_survive_a_cut_connection(stack: ExitStack) -> None:
    tcp = msgspec.structs.replace(TIGHT, transports=("tcp",))
    encoder = stack.enter_context(closing(Encoder(tcp)))
    there = coordinates(encoder.answer("a"), "a")
    assert there.endpoint is not None
    port = int(there.endpoint.rpartition(":")[2])
    proxy = stack.enter_context(ChaosProxy(port, cut_after=1500, times=1))
    cut = msgspec.structs.replace(there, endpoint=f"tcp://127.0.0.1:{proxy.port}")
    first, second = (stack.enter_context(closing(Language(tcp))) for _ in range(2))
    first.consumer.require("r", "a", cut)
    assert np.array_equal(second.fetch("r", "a", there), rows_like(0))
    assert np.array_equal(first.fetch("r", "a", cut), rows_like(0))
    assert proxy.cuts == 1
    until(lambda: encoder.offered == 0)


def test_a_second_claim_of_a_consumer_ends_its_first_one(stack: ExitStack) -> None:
    """The first one has lost its connection, so the producer hears nothing of its end."""
    tcp = msgspec.structs.replace(TIGHT, transports=("tcp",), peer_timeout=NOTICES_LOSS_S)
    encoder = stack.enter_context(closing(Encoder(tcp)))
    there = coordinates(encoder.answer("a"), "a")
    language = stack.enter_context(closing(Language(tcp)))
    lose(language, there)
    assert encoder.offered == 1
    again = coordinates(encoder.answer("a"), "a")
    assert np.array_equal(language.fetch("s", "a", again), rows_like(0))
    until(lambda: encoder.offered == 0)


def test_a_silent_consumer_gives_way_when_the_bytes_are_needed(stack: ExitStack) -> None:
    tcp = msgspec.structs.replace(TIGHT, transports=("tcp",), peer_timeout=NOTICES_LOSS_S)
    encoder = stack.enter_context(closing(Encoder(tcp)))
    language = stack.enter_context(closing(Language(tcp)))
    for seed, mm_hash in enumerate("ab"):
        lose(language, coordinates(encoder.answer(mm_hash, seed), mm_hash))
    assert REFUSED in encoder.answer("c", 2)["c"], "they may come back"
    encoder.producer._config = msgspec.structs.replace(tcp, claim_timeout=1e-9)
    assert KEY in encoder.answer("c", 2)["c"]
    assert encoder.offered == 1


def lose(language: Language, there: Coordinates) -> None:
    """Has a transfer begin and lose its connection for good."""
    assert there.endpoint is not None
    port = int(there.endpoint.rpartition(":")[2])
    with ChaosProxy(port, cut_after=1500, dies=True) as proxy:
        cut = msgspec.structs.replace(there, endpoint=f"tcp://127.0.0.1:{proxy.port}")
        with pytest.raises(PeerGone):
            language.fetch("lost", "lost", cut)
        assert proxy.cuts == 1


def test_random_requests_get_their_own_pictures(stack: ExitStack, encoder: Encoder) -> None:
    """Consumers ask for answers of any age, leave, and ask again. What arrives is the picture of the hash."""
    chance = random.Random(7)
    consumers = languages(stack, 3)
    answers: dict[str, list[Coordinates]] = {str(seed): [] for seed in range(5)}
    arrived = 0
    for step in range(60):
        mm_hash = chance.choice(list(answers))
        entry = encoder.answer(mm_hash, int(mm_hash))[mm_hash]
        if KEY in entry:
            answers[mm_hash].append(coordinates({mm_hash: entry}, mm_hash))
        language, request = chance.choice(consumers), str(step)
        if not answers[mm_hash]:
            continue
        there = chance.choice(answers[mm_hash])
        with suppress(LeaseExpired, CapacityError):
            if chance.random() < 0.2:
                language.consumer.require(request, mm_hash, there)
            else:
                assert np.array_equal(language.fetch(request, mm_hash, there), rows_like(int(mm_hash)))
                arrived += 1
        language.consumer.release(request)
        assert encoder.producer.offers.nbytes <= TIGHT.offered_bytes
    assert arrived > 20


def test_a_receiver_without_claims_fetches_in_the_room_of_the_coordinates(encoder: Encoder) -> None:
    """A consumer of an earlier version does, also several times."""
    there = coordinates(encoder.answer("a"), "a")
    assert there.endpoint is not None
    geometry = Geometry(SHAPE.layout, 16, 8)
    with closing(ReceiveManager(geometry, make_transports(("shm",), "127.0.0.1", None, CONFIG.trust))) as manager:
        for _ in range(2):
            receiver = manager.open(there.room, there.endpoint, GatherSink())
            receiver.init()
            until(lambda receiver=receiver: receiver.poll() is KVPoll.Success)
            rows = as_fields(receiver.arrays())["input_embeddings"]
            assert np.array_equal(rows, rows_like(0))
            receiver.clear()
            until(lambda: encoder.offered == 0)
