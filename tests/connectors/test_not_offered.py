"""Coordinates without an endpoint: the consumer has it, or asks the router who offers it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry.connectors.vllm.coordinates import KEY, Coordinates
from embferry.connectors.vllm.router import Router
from embferry.protocol.errors import EmbeddingTransferError, LayoutMismatch, PeerGone
from embferry.testing.proxy import ChaosProxy

from .pair import CONFIG, Encode, Language, rows_like, until
from .stub_router import Answer, StubRouter

pytestmark = pytest.mark.integration

TCP = msgspec.structs.replace(CONFIG, transports=("tcp",))
TOKEN = "the-token"


class Stage:
    """A producer, a consumer, and the router between them."""

    def __init__(self, router: StubRouter, wait_s: float) -> None:
        self.stub = router
        self.encode = Encode(TCP)
        self.router = Router(router.url, wait_s)
        self.language = Language(TCP, self.router)
        self.encode.publish("a")

    def named(self, room: int = 77) -> Coordinates:
        """Of what the consumer should have."""
        where = self.encode.where("a", 1, TOKEN)
        return msgspec.structs.replace(where, endpoint=None, room=room)

    def offered(self, room: int = 77) -> Answer:
        return 200, {KEY: msgspec.to_builtins(self.encode.where("a", room, TOKEN))}

    def fails(self, where: Coordinates, error: type[EmbeddingTransferError], match: str) -> None:
        began = time.monotonic()
        with pytest.raises(error, match=match):
            self.language.fetch("r", "a", where)
        assert time.monotonic() - began < 2

    def close(self) -> None:
        for part in (self.encode, self.language, self.router):
            part.close()
        self.stub.__exit__()


Staging = Callable[..., Stage]


@pytest.fixture
def staging() -> Iterator[Staging]:
    stages: list[Stage] = []

    def make(*, wait_s: float = 5.0, **router: Any) -> Stage:
        stages.append(Stage(StubRouter(**router), wait_s))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


def test_what_is_here_is_taken_and_nobody_asked(staging: Staging) -> None:
    stage = staging()
    stage.language.fetch("r", "a", stage.encode.where("a"))
    stage.language.consumer.finished("r")
    assert stage.language.consumer.want("s", "a", stage.named())
    assert np.array_equal(stage.language.rows("a"), rows_like(0))
    assert stage.stub.asked == []
    assert stage.language.count("cache_hits") == 1
    assert stage.language.count("asked_again") == 0


def test_what_is_on_its_way_is_waited_for(staging: Staging) -> None:
    stage = staging()
    assert not stage.language.consumer.want("r", "a", stage.encode.where("a"))
    stage.language.fetch("s", "a", stage.named())
    assert stage.stub.asked == []


def test_what_is_not_here_is_asked_for(staging: Staging) -> None:
    stage = staging()
    stage.stub.replace = lambda token, said: stage.offered()
    assert np.array_equal(stage.language.fetch("r", "a", stage.named()), rows_like(0))
    ((_, token, said),) = stage.stub.of("replacements")
    assert (token, said["endpoint"]) == (TOKEN, None)
    count = stage.language.count
    assert (count("asked_again"), count("losses", "peer_gone"), count("transfers", "success")) == (1, 0, 1)
    assert count("replacements", "found") == 0  # nothing was lost


def test_progress_needs_nobody_to_look(staging: Staging) -> None:
    """vLLM's loop may be in a long step."""
    stage = staging()
    stage.stub.replace = lambda token, said: stage.offered()
    assert not stage.language.consumer.want("r", "a", stage.named())
    until(lambda: stage.encode.tally.read().counts.get(("offers_ended", "fetched")) == 1)
    assert stage.language.consumer.want("r", "a", stage.named())


def test_whoever_waits_in_the_engine_is_told(staging: Staging) -> None:
    stage = staging()
    assert not stage.language.consumer.want("r", "a", stage.named())
    began = time.monotonic()
    stage.language.consumer.wait(4.0)  # the router's answer is that there is nobody
    assert time.monotonic() - began < 3
    with pytest.raises(PeerGone, match="cannot be had again"):
        stage.language.consumer.want("r", "a", stage.named())


def test_two_requests_ask_once(staging: Staging) -> None:
    stage = staging(pause=0.1)
    stage.stub.replace = lambda token, said: stage.offered()
    assert not stage.language.consumer.want("r", "a", stage.named())
    assert not stage.language.consumer.want("s", "a", stage.named(78))
    stage.language.fetch("s", "a", stage.named(78))
    assert len(stage.stub.asked) == 1


def test_a_producer_that_is_lost_afterwards_is_replaced(staging: Staging) -> None:
    stage = staging()
    where = stage.encode.where("a", 77, TOKEN)
    assert where.endpoint is not None
    with ChaosProxy(int(where.endpoint.rpartition(":")[2]), cut_after=1500, dies=True) as proxy:
        dying = msgspec.structs.replace(where, endpoint=f"tcp://127.0.0.1:{proxy.port}")
        stage.stub.replace = lambda token, said: (
            (200, {KEY: msgspec.to_builtins(dying)}) if said["endpoint"] is None else stage.offered()
        )
        assert np.array_equal(stage.language.fetch("r", "a", stage.named()), rows_like(0))
    assert [said["endpoint"] for _, _, said in stage.stub.asked] == [None, dying.endpoint]
    assert stage.language.count("replacements", "found") == 1


def test_without_a_router_it_fails_at_once(staging: Staging) -> None:
    stage = staging()
    alone = Language(TCP)
    with pytest.raises(PeerGone, match="no router to ask"):
        alone.consumer.want("r", "a", stage.named())
    assert np.array_equal(alone.fetch("s", "a", stage.encode.where("a")), rows_like(0))
    alone.close()


def test_without_a_token_it_fails_at_once(staging: Staging) -> None:
    stage = staging()
    stage.fails(msgspec.structs.replace(stage.named(), replacement=None), PeerGone, "no router to ask")
    assert stage.stub.asked == []


def test_the_next_request_is_not_hurt(staging: Staging) -> None:
    stage = staging(replace=lambda token, said: (503, {"error": {"message": "no encoder"}}))
    stage.fails(stage.named(), PeerGone, "cannot be had again: .*no encoder")
    stage.language.consumer.finished("r")
    assert np.array_equal(stage.language.fetch("s", "a", stage.encode.where("a")), rows_like(0))


def test_another_that_waited_for_it_asks_for_itself(staging: Staging) -> None:
    stage = staging(pause=0.1)
    assert not stage.language.consumer.want("r", "a", stage.named())
    assert not stage.language.consumer.want("s", "a", stage.named(78))
    until(lambda: stage.stub.asked)
    stage.stub.replace = lambda token, said: stage.offered(78) if len(stage.stub.asked) > 1 else (503, None)
    assert np.array_equal(stage.language.fetch("s", "a", stage.named(78)), rows_like(0))


def test_the_router_says_nothing(staging: Staging) -> None:
    stage = staging(wait_s=0.3, pause=30.0)
    stage.fails(stage.named(), PeerGone, "the router .* does not answer")


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda where: b"<html>",
    "nobody": lambda where: {KEY: where | {"endpoint": None}},
    "another room": lambda where: {KEY: where | {"room": 7}},
    "another length": lambda where: {KEY: where | {"tokens": 1}},
    "no endpoint": lambda where: {KEY: where | {"endpoint": "http://x"}},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_answers_that_cannot_be(staging: Staging, wrong: Callable[[dict[str, Any]], Any]) -> None:
    stage = staging()
    where = msgspec.to_builtins(stage.encode.where("a", 77, TOKEN))
    stage.stub.replace = lambda token, said: (200, wrong(where))
    stage.fails(stage.named(), PeerGone, "cannot be had again")


def test_another_shape_under_its_name_is_refused(staging: Staging) -> None:
    stage = staging()
    stage.language.fetch("r", "a", stage.encode.where("a"))
    with pytest.raises(LayoutMismatch):
        stage.language.consumer.want("s", "a", msgspec.structs.replace(stage.named(), tokens=7))


def test_a_request_that_is_given_up_meanwhile(staging: Staging) -> None:
    stage = staging(pause=0.2)
    stage.stub.replace = lambda token, said: stage.offered()
    assert not stage.language.consumer.want("r", "a", stage.named())
    until(lambda: stage.stub.asked)
    arrival = stage.language.consumer._arrivals["a"]
    stage.language.consumer.finished("r")
    until(lambda: ("items_offered", "") in stage.encode.tally.read().counts)
    stage.router._asking.shutdown(wait=True)
    assert arrival._receiver is None  # what the router found was not taken up
    assert stage.language.count("transfers", "success") == 0
    assert not stage.language.consumer.is_here("a")
