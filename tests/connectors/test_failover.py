"""A producer is lost in the middle: the router names another one, and the transfer continues where it stood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import IntegrityError, PeerGone
from embferry.connectors.vllm.coordinates import KEY, Coordinates
from embferry.connectors.vllm.router_client import RouterClient
from embferry.testing.proxy import ChaosProxy

from .pair import (
    CONFIG,
    GUARD_S,
    NBYTES,
    NOTICES_LOSS_S,
    NOTICES_LOSS_SOON_S,
    Encode,
    Language,
    rows_like,
    until,
    with_peer_timeout,
)
from .stub_router import Answer, StubRouter

pytestmark = pytest.mark.integration

TCP = msgspec.structs.replace(CONFIG, transports=("tcp",))
TOKEN = "the-token"


class Stage:
    """Two producers, a consumer, and the router between them. The first producer dies when a part has arrived."""

    def __init__(self, stub: StubRouter, wait_s: float, peer_timeout: float) -> None:
        self.stub = stub
        self.first, self.second = Encode(TCP), Encode(TCP)
        self.router = RouterClient(stub.url, wait_s)
        self.language = Language(with_peer_timeout(TCP, peer_timeout), self.router)
        self.proxies: list[ChaosProxy] = []

    def dying_offer(self) -> Coordinates:
        """Offers an embedding whose transfer stops in the middle."""
        self.first.publish("a")
        coordinates = self.first.offer("a", token=TOKEN)
        assert coordinates.endpoint is not None
        proxy = ChaosProxy(int(coordinates.endpoint.rpartition(":")[2]), cut_after=1500, dies=True)
        proxy.__enter__()
        self.proxies.append(proxy)
        return msgspec.structs.replace(coordinates, endpoint=f"tcp://127.0.0.1:{proxy.port}")

    def at_the_second(self, room: int, seed: int = 0) -> Answer:
        self.second.publish("a", seed)
        return 200, {KEY: msgspec.to_builtins(self.second.offer("a", room, TOKEN))}

    def fails(self, coordinates: Coordinates, match: str | None) -> None:
        with pytest.raises(PeerGone, match=match):
            self.language.fetch("r", "a", coordinates)

    def close(self) -> None:
        for part in (self.first, self.second, self.language, self.router, self.stub):
            part.close()
        for proxy in self.proxies:
            proxy.__exit__()


Staging = Callable[..., Stage]


@pytest.fixture
def staging() -> Iterator[Staging]:
    stages: list[Stage] = []

    def make(*, wait_s: float = GUARD_S, peer_timeout: float = NOTICES_LOSS_S, **router: Any) -> Stage:
        stages.append(Stage(StubRouter(**router), wait_s, peer_timeout))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


def test_the_transfer_continues_where_it_stood(staging: Staging) -> None:
    stage = staging()
    coordinates = stage.dying_offer()
    stage.stub.failover = lambda token, body: stage.at_the_second(coordinates.room)
    rows = stage.language.fetch("r", "a", coordinates)
    assert np.array_equal(rows, rows_like(0))
    ((token, body),) = stage.stub.failovers()
    assert token == TOKEN
    assert body["code"] == "peer_gone"
    assert body["endpoint"] == coordinates.endpoint
    count = stage.language.count
    assert (count("losses", "peer_gone"), count("failovers", "found"), count("transfers", "success")) == (1, 1, 1)
    assert count("bytes_sent_twice") == 0
    assert count("wire_bytes") == NBYTES


def test_different_content_is_received_from_the_start(staging: Staging) -> None:
    stage = staging()
    coordinates = stage.dying_offer()
    stage.stub.failover = lambda token, body: stage.at_the_second(coordinates.room, seed=5)
    assert np.array_equal(stage.language.fetch("r", "a", coordinates), rows_like(5))


def test_the_failover_proceeds_without_polling(staging: Staging) -> None:
    """The engine may be in a long step meanwhile."""
    stage = staging()
    coordinates = stage.dying_offer()
    stage.stub.failover = lambda token, body: stage.at_the_second(coordinates.room)
    assert not stage.language.consumer.require("r", "a", coordinates)
    until(lambda: stage.second.produced("offers_ended", "fetched") == 1)
    assert stage.language.consumer.require("r", "a", coordinates)


def test_the_router_is_asked_once_for_each_loss(staging: Staging) -> None:
    """The last chunks may still be verified while it is asked."""
    stage = staging(pause=0.3)
    coordinates = stage.dying_offer()
    stage.stub.failover = lambda token, body: stage.at_the_second(coordinates.room)
    assert not stage.language.consumer.require("r", "a", coordinates)
    until(lambda: stage.stub.calls)
    embedding = stage.language.consumer._embeddings["a"]
    assert embedding._receiver is not None
    embedding._changed(embedding._receiver)
    stage.language.fetch("r", "a", coordinates)
    assert len(stage.stub.calls) == 1


@pytest.mark.parametrize("status", [404, 503])
def test_without_another_producer_the_error_names_both_reasons(staging: Staging, status: int) -> None:
    stage = staging(
        peer_timeout=NOTICES_LOSS_SOON_S, failover=lambda token, body: (status, {"error": {"message": "no encoder"}})
    )
    stage.fails(stage.dying_offer(), rf"token \d+.*no other producer took over.*{status}: no encoder")
    assert stage.language.count("failovers", "none") == 1


def test_a_router_that_does_not_answer_fails_the_request(staging: Staging) -> None:
    stage = staging(wait_s=0.3, peer_timeout=NOTICES_LOSS_SOON_S, pause=10 * GUARD_S)
    stage.fails(stage.dying_offer(), "the router .* does not answer")


def test_a_router_that_is_gone_fails_the_request(staging: Staging) -> None:
    stage = staging(peer_timeout=NOTICES_LOSS_SOON_S)
    stage.router.close()
    stage.router = stage.language.consumer._router = RouterClient("http://127.0.0.1:9", GUARD_S)
    stage.fails(stage.dying_offer(), "the router .* does not answer")


def test_without_a_token_the_router_is_not_asked(staging: Staging) -> None:
    stage = staging(peer_timeout=NOTICES_LOSS_SOON_S)
    stage.fails(msgspec.structs.replace(stage.dying_offer(), failover_token=None), None)
    assert stage.stub.calls == []


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda offered: b"<html>",
    "no coordinates": lambda offered: {},
    "malformed ones": lambda offered: {KEY: {"room": 7}},
    "another room": lambda offered: {KEY: offered | {"room": 7}},
    "another length": lambda offered: {KEY: offered | {"tokens": 1}},
    "another width": lambda offered: {KEY: offered | {"width": 1}},
    "no endpoint": lambda offered: {KEY: offered | {"endpoint": "http://x"}},
    "too long an answer": lambda offered: b" " * (1 << 17),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_an_invalid_answer_of_the_router_fails_the_request(
    staging: Staging, wrong: Callable[[dict[str, Any]], Any]
) -> None:
    stage = staging(peer_timeout=NOTICES_LOSS_SOON_S)
    coordinates = stage.dying_offer()
    stage.stub.failover = lambda token, body: (200, wrong(msgspec.to_builtins(coordinates)))
    stage.fails(coordinates, "no other producer took over")


def test_redirects_are_not_followed(staging: Staging) -> None:
    with StubRouter() as elsewhere:
        location = elsewhere.url + "/ec/failovers/x"
        stage = staging(peer_timeout=NOTICES_LOSS_SOON_S, failover=lambda token, body: (307, None), location=location)
        stage.fails(stage.dying_offer(), "307")
        assert elsewhere.calls == []


def test_proxies_are_not_used(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    stage = staging()
    coordinates = stage.dying_offer()
    stage.stub.failover = lambda token, body: stage.at_the_second(coordinates.room)
    stage.language.fetch("r", "a", coordinates)
    assert stage.stub.calls


def test_the_answer_to_an_aborted_request_is_not_used(staging: Staging) -> None:
    stage = staging(pause=0.2)
    coordinates = stage.dying_offer()
    stage.stub.failover = lambda token, body: stage.at_the_second(coordinates.room)
    assert not stage.language.consumer.require("r", "a", coordinates)
    until(lambda: stage.stub.calls)
    stage.language.consumer.release("r")
    until(lambda: stage.second.produced("items_offered"))
    assert stage.language.count("transfers", "aborted") == 1
    assert not stage.language.consumer.has("a")
    assert np.array_equal(stage.language.fetch("s", "a", stage.second.offer("a")), rows_like(0))


def test_a_producer_that_aborts_is_replaced_without_waiting_for_a_time_out(staging: Staging) -> None:
    stage = staging(peer_timeout=10 * GUARD_S)
    stage.first.publish("a")
    coordinates = stage.first.offer("a", token=TOKEN)
    stage.first.producer._rooms[coordinates.room][0].abort()
    stage.stub.failover = lambda token, body: stage.at_the_second(coordinates.room)
    assert np.array_equal(stage.language.fetch("r", "a", coordinates), rows_like(0))


def test_the_router_may_name_the_same_producer_again(staging: Staging) -> None:
    """Its room has ended, and is opened once more."""
    stage = staging(peer_timeout=GUARD_S)
    stage.first.publish("a")
    coordinates = stage.first.offer("a", token=TOKEN)
    stage.first.producer._rooms[coordinates.room][0].abort()
    stage.stub.failover = lambda token, body: (
        200,
        {KEY: msgspec.to_builtins(stage.first.offer("a", coordinates.room, TOKEN))},
    )
    assert np.array_equal(stage.language.fetch("r", "a", coordinates), rows_like(0))
    until(lambda: stage.first.producer.offers.nbytes == 0)


def test_the_reason_of_a_failure_is_reported(staging: Staging) -> None:
    stage = staging()
    stage.router.report_failure(TOKEN, IntegrityError("it is damaged")).result(GUARD_S)
    body = {"code": "integrity_error", "message": "it is damaged", "retryable": False}
    assert stage.stub.calls == [("failures", TOKEN, body)]


def test_a_report_to_an_absent_router_raises_nothing() -> None:
    router = RouterClient("http://127.0.0.1:9", 1.0)
    assert router.report_failure(TOKEN, PeerGone("gone")).exception(GUARD_S) is None
    router.close()


def test_a_token_cannot_change_the_path(staging: Staging) -> None:
    stage = staging()
    stage.router.report_failure("../x?y", PeerGone("gone")).result(GUARD_S)
    assert stage.stub.calls[0][1] == "..%2Fx%3Fy"
