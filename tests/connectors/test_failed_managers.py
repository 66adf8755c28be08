"""A manager that has lost every transport is replaced. What it had under way fails, or goes on with another one."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import closing

import msgspec
import numpy as np
import pytest

from embferry import CapacityError, EmbeddingTransferError, LocalProtocolError, TransportError
from embferry.connectors.shared.shared_rows import SharedRows
from embferry.connectors.vllm.coordinates import Coordinates
from embferry.connectors.vllm.incoming_embedding import IncomingEmbedding
from embferry.transfer.manager import Manager

from .pair import CONFIG, SHAPE, Pair, rows_like, until
from .routed import TOKEN, Routed

pytestmark = pytest.mark.integration

MakeRouted = Callable[..., Routed]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with closing(Pair(CONFIG)) as made:
        yield made


def break_manager(manager: Manager) -> None:  # type: ignore[type-arg]  # of either end
    """Every transport fails, as if its thread had raised."""
    with manager.lock:
        for transport in manager.transports.values():
            transport._lose("poll", RuntimeError("its thread has ended"))
    manager.wake()
    assert manager.fault is not None


def unanswered(pair: Pair) -> Coordinates:
    """Returns coordinates of a room that the producer does not know yet."""
    pair.publish("a")
    return msgspec.structs.replace(pair.offer("a"), room=7)


def test_a_consumer_s_manager_is_replaced(pair: Pair) -> None:
    waiting = unanswered(pair)
    assert not pair.consumer.require("r", "b", waiting)
    (manager,) = pair.consumer._managers._managers.values()
    break_manager(manager)
    failed: list[EmbeddingTransferError] = []

    def has_failed() -> bool:
        try:
            pair.consumer.require("r", "b", waiting)
        except EmbeddingTransferError as error:
            failed.append(error)
        return bool(failed)

    until(has_failed)
    assert isinstance(failed[0], TransportError)
    assert "its thread has ended" in failed[0].detail
    for request, name in ("s", "a"), ("t", "c"):
        pair.publish(name)
        assert np.array_equal(pair.fetch(request, name, pair.offer(name)), rows_like(0))
    assert pair.count("managers_replaced") == 1
    (replacement,) = pair.consumer._managers._managers.values()
    assert replacement is not manager
    until(lambda: manager._is_closed)


def test_a_producer_s_manager_is_replaced_and_its_offer_is_renewed(pair: Pair) -> None:
    rows = pair.publish("a")
    old = pair.offer("a", room=77)
    (manager,) = pair.producer._managers._managers.values()
    break_manager(manager)
    new = pair.offer("a", room=77)
    assert new.endpoint != old.endpoint
    assert np.array_equal(pair.fetch("r", "a", new), rows)
    until(lambda: pair.producer.offers.nbytes == 0)
    assert (pair.produced("offers_ended", "fetched"), pair.produced("managers_replaced")) == (1, 1)
    pair.producer.offers.end_all(manager)  # the thread that closes it may come to this late
    assert pair.producer.offers.is_empty


def test_offers_of_a_failed_manager_end_without_another_offer(pair: Pair) -> None:
    pair.publish("a")
    pair.offer("a")
    (manager,) = pair.producer._managers._managers.values()
    break_manager(manager)
    until(lambda: pair.producer.offers.nbytes == 0)


def test_a_transfer_of_a_failed_manager_goes_on_with_the_producer_that_the_router_names(
    make_routed: MakeRouted,
) -> None:
    routed = make_routed()
    routed.first.publish("a")
    waiting = msgspec.structs.replace(routed.first.offer("a", token=TOKEN), room=7)
    routed.stub.failover = lambda token, body: routed.at_second(7)
    consumer = routed.language.consumer
    assert not consumer.require("r", "a", waiting)
    (manager,) = consumer._managers._managers.values()
    break_manager(manager)
    assert np.array_equal(routed.language.fetch("r", "a", waiting), rows_like(0))
    ((_, body),) = routed.stub.failovers()
    assert (body["code"], body["endpoint"]) == ("transport_error", waiting.endpoint)
    assert routed.count("managers_replaced") == routed.count("transfers", "success") == 1


def test_without_another_producer_the_reason_is_the_manager_s(make_routed: MakeRouted) -> None:
    routed = make_routed(failover=lambda token, body: (503, {"error": {"message": "no encoder"}}))
    routed.first.publish("a")
    waiting = msgspec.structs.replace(routed.first.offer("a", token=TOKEN), room=7)
    assert not routed.language.consumer.require("r", "a", waiting)
    (manager,) = routed.language.consumer._managers._managers.values()
    break_manager(manager)
    with pytest.raises(TransportError, match=r"its thread has ended.*no encoder"):
        routed.language.fetch("r", "a", waiting)


def test_a_manager_that_cannot_be_made_fails_the_request_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.publish("a")
    coordinates = pair.offer("a")

    def fail(config: object) -> None:
        raise TransportError("the port is taken")

    monkeypatch.setattr(type(CONFIG), "make_transports", fail)
    with pytest.raises(TransportError, match="port"):
        pair.consumer.require("r", "a", coordinates)
    monkeypatch.undo()
    assert np.array_equal(pair.fetch("r", "a", coordinates), rows_like(0))


ERRORS = {
    "no memory": (OSError(errno.ENOMEM, "no memory"), CapacityError),
    "no descriptors": (OSError(errno.EMFILE, "no descriptors"), CapacityError),
    "MemoryError": (MemoryError(), CapacityError),
    "a bug": (RuntimeError("a bug"), LocalProtocolError),
}


@pytest.mark.parametrize(("raised", "expected"), ERRORS.values(), ids=ERRORS.keys())
def test_an_allocation_that_fails_fails_one_request(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[EmbeddingTransferError]
) -> None:
    make = SharedRows.make

    def refuse_once(*arguments: object) -> SharedRows:
        monkeypatch.setattr(SharedRows, "make", make)
        raise raised

    for seed, name in enumerate("ab"):
        pair.publish(name, seed)
    monkeypatch.setattr(SharedRows, "make", refuse_once)
    with pytest.raises(expected):
        pair.fetch("r", "a", pair.offer("a"))
    assert np.array_equal(pair.fetch("s", "b", pair.offer("b")), rows_like(1))
    assert np.array_equal(pair.fetch("r", "a", pair.offer("a")), rows_like(0))


def test_an_aborted_embedding_allocates_nothing_later(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback thread may come to it after the request has ended."""
    waiting = unanswered(pair)
    assert not pair.consumer.require("r", "b", waiting)
    embedding: IncomingEmbedding = pair.consumer._embeddings["b"]
    pair.consumer.release("r")

    def allocated(*_: object) -> SharedRows:
        pytest.fail("memory for an embedding that has been given up")

    monkeypatch.setattr(SharedRows, "make", allocated)
    assert embedding._manager is not None
    assert embedding._make_rows(embedding._manager, SHAPE.tokens) == {}
    assert embedding.shared is None
