"""Coordinates without an endpoint: the consumer has the embedding, or asks the router for a producer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import LayoutMismatch, PeerGone
from embferry.connectors.vllm.coordinates import KEY, Coordinates

from .pair import GUARD_S, NOTICES_LOSS_S, Language, rows_like, until
from .routed import TCP, TOKEN, Routed, answer
from .stub_router import Answer

pytestmark = pytest.mark.integration

MakeRouted = Callable[..., Routed]


@pytest.fixture
def make_routed(make_routed: MakeRouted) -> MakeRouted:
    """Publishes an embedding at the first producer."""

    def make(**options: Any) -> Routed:
        routed = make_routed(**options)
        routed.first.publish("a")
        return routed

    return make


def unoffered(routed: Routed, room: int = 77) -> Coordinates:
    """Returns coordinates of an embedding that the consumer should have."""
    return msgspec.structs.replace(routed.first.offer("a", 1, TOKEN), endpoint=None, room=room)


def offered(routed: Routed, room: int = 77) -> Answer:
    return answer(routed.first.offer("a", room, TOKEN))


def test_an_embedding_that_is_here_is_used_without_asking(make_routed: MakeRouted) -> None:
    routed = make_routed()
    routed.language.fetch("r", "a", routed.first.offer("a"))
    routed.language.consumer.release("r")
    assert routed.language.consumer.require("s", "a", unoffered(routed))
    assert np.array_equal(routed.language.rows("a"), rows_like(0))
    assert routed.stub.calls == []
    assert routed.count("cache_hits") == 1
    assert routed.count("asked_again") == 0


def test_an_embedding_under_way_is_waited_for(make_routed: MakeRouted, monkeypatch: pytest.MonkeyPatch) -> None:
    routed, may_map = make_routed(), threading.Event()
    mapped = routed.language.rank._map
    with monkeypatch.context() as patch:
        patch.setattr(routed.language.rank, "_map", lambda packet, fd: (may_map.wait(GUARD_S), mapped(packet, fd)))
        assert not routed.language.consumer.require("r", "a", routed.first.offer("a"))
        assert not routed.language.consumer.require("s", "a", unoffered(routed))
        may_map.set()
        routed.language.fetch("s", "a", unoffered(routed))
    assert routed.stub.calls == []


def test_the_router_is_asked_for_an_embedding_that_is_not_here(make_routed: MakeRouted) -> None:
    routed = make_routed()
    routed.stub.failover = lambda token, body: offered(routed)
    assert np.array_equal(routed.language.fetch("r", "a", unoffered(routed)), rows_like(0))
    ((token, body),) = routed.stub.failovers()
    assert (token, body["endpoint"]) == (TOKEN, None)
    assert routed.count("asked_again") == routed.count("transfers", "success") == 1
    assert routed.count("losses", "peer_gone") == routed.count("failovers", "found") == 0, "no producer was lost"


def test_the_transfer_proceeds_without_polling(make_routed: MakeRouted) -> None:
    """The engine may be in a long step meanwhile."""
    routed, waits = make_routed(), threading.Event()

    def offer(token: str, body: dict[str, Any]) -> Answer:
        assert waits.wait(GUARD_S)
        return offered(routed)

    routed.stub.failover = offer
    assert not routed.language.consumer.require("r", "a", unoffered(routed))
    waits.set()
    until(lambda: routed.first.produced("offers_ended", "fetched") == 1)
    assert routed.language.consumer.wait(GUARD_S)  # until the rank has mapped it, too
    assert routed.language.consumer.require("r", "a", unoffered(routed))


def test_a_failure_ends_the_engine_s_wait(make_routed: MakeRouted) -> None:
    routed, waits = make_routed(), threading.Event()

    def refuse(token: str, body: dict[str, Any]) -> Answer:
        assert waits.wait(GUARD_S)
        return 503, {"error": {"message": "no other encoder"}}

    routed.stub.failover = refuse
    assert not routed.language.consumer.require("r", "a", unoffered(routed))
    waits.set()
    assert routed.language.consumer.wait(GUARD_S)
    with pytest.raises(PeerGone):
        routed.language.consumer.require("r", "a", unoffered(routed))


def test_two_requests_ask_the_router_once(make_routed: MakeRouted) -> None:
    routed = make_routed(pause=0.1)
    routed.stub.failover = lambda token, body: offered(routed)
    assert not routed.language.consumer.require("r", "a", unoffered(routed))
    assert not routed.language.consumer.require("s", "a", unoffered(routed, 78))
    routed.language.fetch("s", "a", unoffered(routed, 78))
    assert len(routed.stub.calls) == 1


def test_another_producer_takes_over_if_the_named_one_is_lost(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    dying = routed.dying(routed.first.offer("a", 77, TOKEN))
    routed.stub.failover = lambda token, body: answer(dying) if body["endpoint"] is None else offered(routed)
    assert np.array_equal(routed.language.fetch("r", "a", unoffered(routed)), rows_like(0))
    assert [body["endpoint"] for _, body in routed.stub.failovers()] == [None, dying.endpoint]
    assert routed.count("failovers", "found") == 1


def test_without_a_router_the_request_fails(make_routed: MakeRouted) -> None:
    routed = make_routed()
    alone = Language(TCP)
    with pytest.raises(PeerGone, match="router"):
        alone.consumer.require("r", "a", unoffered(routed))
    alone.close()


def test_without_a_token_the_request_fails(make_routed: MakeRouted) -> None:
    routed = make_routed()
    routed.fails(msgspec.structs.replace(unoffered(routed), failover_token=None), "router")
    assert routed.stub.calls == []


def test_the_next_request_succeeds_after_a_failure(make_routed: MakeRouted) -> None:
    routed = make_routed(failover=lambda token, body: (503, {"error": {"message": "no encoder"}}))
    routed.fails(unoffered(routed), "no encoder")
    routed.language.consumer.release("r")
    assert np.array_equal(routed.language.fetch("s", "a", routed.first.offer("a")), rows_like(0))


def test_a_request_that_waited_asks_for_itself_after_a_failure(make_routed: MakeRouted) -> None:
    routed = make_routed(pause=0.1)
    assert not routed.language.consumer.require("r", "a", unoffered(routed))
    assert not routed.language.consumer.require("s", "a", unoffered(routed, 78))
    until(lambda: routed.stub.calls)
    routed.stub.failover = lambda token, body: offered(routed, 78) if len(routed.stub.calls) > 1 else (503, None)
    assert np.array_equal(routed.language.fetch("s", "a", unoffered(routed, 78)), rows_like(0))


def test_a_router_that_does_not_answer_fails_the_request(make_routed: MakeRouted) -> None:
    routed = make_routed(wait_s=0.3, pause=10 * GUARD_S)
    routed.fails(unoffered(routed), "does not answer")


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda offered: b"<html>",
    "no producer": lambda offered: {KEY: offered | {"endpoint": None}},
    "another room": lambda offered: {KEY: offered | {"room": 7}},
    "another length": lambda offered: {KEY: offered | {"tokens": 1}},
    "no endpoint": lambda offered: {KEY: offered | {"endpoint": "http://x"}},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_an_invalid_answer_of_the_router_fails_the_request(
    make_routed: MakeRouted, wrong: Callable[[dict[str, Any]], Any]
) -> None:
    routed = make_routed()
    offered = msgspec.to_builtins(routed.first.offer("a", 77, TOKEN))
    routed.stub.failover = lambda token, body: (200, wrong(offered))
    routed.fails(unoffered(routed), "cannot be obtained again")


def test_another_shape_of_the_same_hash_is_refused(make_routed: MakeRouted) -> None:
    routed = make_routed()
    routed.language.fetch("r", "a", routed.first.offer("a"))
    with pytest.raises(LayoutMismatch):
        routed.language.consumer.require("s", "a", msgspec.structs.replace(unoffered(routed), tokens=7))


def test_the_answer_to_an_aborted_request_is_not_used(make_routed: MakeRouted) -> None:
    routed = make_routed(pause=0.2)
    routed.stub.failover = lambda token, body: offered(routed)
    assert not routed.language.consumer.require("r", "a", unoffered(routed))
    until(lambda: routed.stub.calls)
    embedding = routed.language.consumer._embeddings["a"]
    routed.language.consumer.release("r")
    routed.router._failovers.shutdown(wait=True)
    assert embedding._receiver is None
    assert routed.count("transfers", "success") == 0
    assert routed.language.consumer.find("a") is None
