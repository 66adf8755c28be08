"""Coordinates without an endpoint: the consumer has the embedding, or asks the router for a producer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import LayoutMismatch, PeerGone
from embferry.connectors.vllm.coordinates import KEY, Coordinates
from embferry.connectors.vllm.router_client import RouterClient
from embferry.testing.proxy import ChaosProxy

from .pair import CONFIG, GUARD_S, NOTICES_LOSS_S, Encode, Language, rows_like, until, with_peer_timeout
from .stub_router import Answer, StubRouter

pytestmark = pytest.mark.integration

TCP = msgspec.structs.replace(CONFIG, transports=("tcp",))
TOKEN = "the-token"


class Stage:
    """A producer, a consumer, and the router between them."""

    def __init__(self, stub: StubRouter, wait_s: float, peer_timeout: float) -> None:
        self.stub = stub
        self.encode = Encode(TCP)
        self.router = RouterClient(stub.url, wait_s)
        self.language = Language(with_peer_timeout(TCP, peer_timeout), self.router)
        self.encode.publish("a")

    def unoffered(self, room: int = 77) -> Coordinates:
        """Coordinates of an embedding that the consumer should have."""
        coordinates = self.encode.offer("a", 1, TOKEN)
        return msgspec.structs.replace(coordinates, endpoint=None, room=room)

    def offered(self, room: int = 77) -> Answer:
        return 200, {KEY: msgspec.to_builtins(self.encode.offer("a", room, TOKEN))}

    def fails(self, coordinates: Coordinates, match: str) -> None:
        with pytest.raises(PeerGone, match=match):
            self.language.fetch("r", "a", coordinates)

    def close(self) -> None:
        for part in (self.encode, self.language, self.router, self.stub):
            part.close()


Staging = Callable[..., Stage]


@pytest.fixture
def staging() -> Iterator[Staging]:
    stages: list[Stage] = []

    def make(*, wait_s: float = GUARD_S, peer_timeout: float = GUARD_S, **router: Any) -> Stage:
        stages.append(Stage(StubRouter(**router), wait_s, peer_timeout))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


def test_an_embedding_that_is_here_is_used_without_asking(staging: Staging) -> None:
    stage = staging()
    stage.language.fetch("r", "a", stage.encode.offer("a"))
    stage.language.consumer.release("r")
    assert stage.language.consumer.require("s", "a", stage.unoffered())
    assert np.array_equal(stage.language.rows("a"), rows_like(0))
    assert stage.stub.calls == []
    assert stage.language.count("cache_hits") == 1
    assert stage.language.count("asked_again") == 0


def test_an_embedding_under_way_is_waited_for(staging: Staging) -> None:
    stage = staging()
    assert not stage.language.consumer.require("r", "a", stage.encode.offer("a"))
    stage.language.fetch("s", "a", stage.unoffered())
    assert stage.stub.calls == []


def test_the_router_is_asked_for_an_embedding_that_is_not_here(staging: Staging) -> None:
    stage = staging()
    stage.stub.failover = lambda token, body: stage.offered()
    assert np.array_equal(stage.language.fetch("r", "a", stage.unoffered()), rows_like(0))
    ((token, body),) = stage.stub.failovers()
    assert (token, body["endpoint"]) == (TOKEN, None)
    count = stage.language.count
    assert (count("asked_again"), count("losses", "peer_gone"), count("transfers", "success")) == (1, 0, 1)
    assert count("failovers", "found") == 0, "no producer was lost"


def test_the_transfer_proceeds_without_polling(staging: Staging) -> None:
    """The engine may be in a long step meanwhile."""
    stage = staging()
    stage.stub.failover = lambda token, body: stage.offered()
    assert not stage.language.consumer.require("r", "a", stage.unoffered())
    until(lambda: stage.encode.produced("offers_ended", "fetched") == 1)
    assert stage.language.consumer.require("r", "a", stage.unoffered())


def test_a_failure_ends_the_engine_s_wait(staging: Staging) -> None:
    stage = staging()
    assert not stage.language.consumer.require("r", "a", stage.unoffered())
    assert stage.language.consumer.wait(GUARD_S)
    with pytest.raises(PeerGone):
        stage.language.consumer.require("r", "a", stage.unoffered())


def test_two_requests_ask_the_router_once(staging: Staging) -> None:
    stage = staging(pause=0.1)
    stage.stub.failover = lambda token, body: stage.offered()
    assert not stage.language.consumer.require("r", "a", stage.unoffered())
    assert not stage.language.consumer.require("s", "a", stage.unoffered(78))
    stage.language.fetch("s", "a", stage.unoffered(78))
    assert len(stage.stub.calls) == 1


def test_another_producer_takes_over_if_the_named_one_is_lost(staging: Staging) -> None:
    stage = staging(peer_timeout=NOTICES_LOSS_S)
    coordinates = stage.encode.offer("a", 77, TOKEN)
    assert coordinates.endpoint is not None
    with ChaosProxy(int(coordinates.endpoint.rpartition(":")[2]), cut_after=1500, dies=True) as proxy:
        dying = msgspec.structs.replace(coordinates, endpoint=f"tcp://127.0.0.1:{proxy.port}")
        stage.stub.failover = lambda token, body: (
            (200, {KEY: msgspec.to_builtins(dying)}) if body["endpoint"] is None else stage.offered()
        )
        assert np.array_equal(stage.language.fetch("r", "a", stage.unoffered()), rows_like(0))
    assert [body["endpoint"] for _, body in stage.stub.failovers()] == [None, dying.endpoint]
    assert stage.language.count("failovers", "found") == 1


def test_without_a_router_the_request_fails(staging: Staging) -> None:
    stage = staging()
    alone = Language(TCP)
    with pytest.raises(PeerGone, match="router"):
        alone.consumer.require("r", "a", stage.unoffered())
    alone.close()


def test_without_a_token_the_request_fails(staging: Staging) -> None:
    stage = staging()
    stage.fails(msgspec.structs.replace(stage.unoffered(), failover_token=None), "router")
    assert stage.stub.calls == []


def test_the_next_request_succeeds_after_a_failure(staging: Staging) -> None:
    stage = staging(failover=lambda token, body: (503, {"error": {"message": "no encoder"}}))
    stage.fails(stage.unoffered(), "no encoder")
    stage.language.consumer.release("r")
    assert np.array_equal(stage.language.fetch("s", "a", stage.encode.offer("a")), rows_like(0))


def test_a_request_that_waited_asks_for_itself_after_a_failure(staging: Staging) -> None:
    stage = staging(pause=0.1)
    assert not stage.language.consumer.require("r", "a", stage.unoffered())
    assert not stage.language.consumer.require("s", "a", stage.unoffered(78))
    until(lambda: stage.stub.calls)
    stage.stub.failover = lambda token, body: stage.offered(78) if len(stage.stub.calls) > 1 else (503, None)
    assert np.array_equal(stage.language.fetch("s", "a", stage.unoffered(78)), rows_like(0))


def test_a_router_that_does_not_answer_fails_the_request(staging: Staging) -> None:
    stage = staging(wait_s=0.3, pause=10 * GUARD_S)
    stage.fails(stage.unoffered(), "does not answer")


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda offered: b"<html>",
    "no producer": lambda offered: {KEY: offered | {"endpoint": None}},
    "another room": lambda offered: {KEY: offered | {"room": 7}},
    "another length": lambda offered: {KEY: offered | {"tokens": 1}},
    "no endpoint": lambda offered: {KEY: offered | {"endpoint": "http://x"}},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_an_invalid_answer_of_the_router_fails_the_request(
    staging: Staging, wrong: Callable[[dict[str, Any]], Any]
) -> None:
    stage = staging()
    offered = msgspec.to_builtins(stage.encode.offer("a", 77, TOKEN))
    stage.stub.failover = lambda token, body: (200, wrong(offered))
    stage.fails(stage.unoffered(), "cannot be obtained again")


def test_another_shape_of_the_same_hash_is_refused(staging: Staging) -> None:
    stage = staging()
    stage.language.fetch("r", "a", stage.encode.offer("a"))
    with pytest.raises(LayoutMismatch):
        stage.language.consumer.require("s", "a", msgspec.structs.replace(stage.unoffered(), tokens=7))


def test_the_answer_to_an_aborted_request_is_not_used(staging: Staging) -> None:
    stage = staging(pause=0.2)
    stage.stub.failover = lambda token, body: stage.offered()
    assert not stage.language.consumer.require("r", "a", stage.unoffered())
    until(lambda: stage.stub.calls)
    embedding = stage.language.consumer._embeddings["a"]
    stage.language.consumer.release("r")
    until(lambda: stage.encode.produced("items_offered"))
    stage.router._failovers.shutdown(wait=True)
    assert embedding._receiver is None
    assert stage.language.count("transfers", "success") == 0
    assert not stage.language.consumer.has("a")
