"""A producer is lost in the middle: the router names another one, and the transfer continues where it stood."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import EmbeddingReceiver, IntegrityError, PeerGone
from embferry.connectors.vllm.coordinates import KEY
from embferry.connectors.vllm.router_client import RouterClient

from .pair import GUARD_S, NBYTES, NOTICES_LOSS_S, NOTICES_LOSS_SOON_S, rows_like, until
from .routed import TOKEN, Routed, answer
from .stub_router import Answer, StubRouter

pytestmark = pytest.mark.integration

MakeRouted = Callable[..., Routed]


def test_the_transfer_continues_where_it_stood(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room)
    rows = routed.language.fetch("r", "a", coordinates)
    assert np.array_equal(rows, rows_like(0))
    ((token, body),) = routed.stub.failovers()
    assert token == TOKEN
    assert body["code"] == "peer_gone"
    assert body["endpoint"] == coordinates.endpoint
    assert (
        routed.count("losses", "peer_gone"),
        routed.count("failovers", "found"),
        routed.count("transfers", "success"),
    ) == (1, 1, 1)
    assert routed.count("repeated_bytes") == 0
    assert routed.count("wire_bytes") == NBYTES


def test_a_failover_is_counted_before_the_transfer_goes_on(
    make_routed: MakeRouted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be complete before the thread that has asked the router runs again."""
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room)
    redirect, is_counted = EmbeddingReceiver.redirect, threading.Event()

    def redirected(receiver: EmbeddingReceiver, endpoint: str) -> None:
        redirect(receiver, endpoint)
        assert is_counted.wait(GUARD_S)

    monkeypatch.setattr(EmbeddingReceiver, "redirect", redirected)
    try:
        routed.language.fetch("r", "a", coordinates)
        assert routed.count("failovers", "found") == 1
    finally:
        is_counted.set()


def test_different_content_is_received_from_the_start(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room, seed=5)
    assert np.array_equal(routed.language.fetch("r", "a", coordinates), rows_like(5))


def test_the_failover_proceeds_without_polling(make_routed: MakeRouted) -> None:
    """The engine may be in a long step meanwhile."""
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room)
    assert not routed.language.consumer.require("r", "a", coordinates)
    until(lambda: routed.second.produced("offers_ended", "fetched") == 1)
    assert routed.language.consumer.wait(GUARD_S)  # until the rank has mapped it, too
    assert routed.language.consumer.require("r", "a", coordinates)


def test_the_router_is_asked_once_for_each_loss(make_routed: MakeRouted) -> None:
    """The last chunks may still be verified while it is asked."""
    routed = make_routed(peer_timeout=NOTICES_LOSS_S, pause=0.3)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room)
    assert not routed.language.consumer.require("r", "a", coordinates)
    until(lambda: routed.stub.calls)
    embedding = routed.language.consumer._embeddings["a"]
    assert embedding._receiver is not None
    embedding._changed(embedding._receiver)
    routed.language.fetch("r", "a", coordinates)
    assert len(routed.stub.calls) == 1


@pytest.mark.parametrize("status", [404, 503])
def test_without_another_producer_the_error_names_both_reasons(make_routed: MakeRouted, status: int) -> None:
    routed = make_routed(
        peer_timeout=NOTICES_LOSS_SOON_S, failover=lambda token, body: (status, {"error": {"message": "no encoder"}})
    )
    routed.fails(routed.dying_offer(), rf"token \d+.*no other producer took over.*{status}: no encoder")
    assert routed.count("failovers", "none") == 1


def test_a_router_that_does_not_answer_fails_the_request(make_routed: MakeRouted) -> None:
    routed = make_routed(wait_s=0.3, peer_timeout=NOTICES_LOSS_SOON_S, pause=10 * GUARD_S)
    routed.router.max_wait_s = GUARD_S  # the transfer waits for the router's client, however late its threads run
    routed.fails(routed.dying_offer(), "the router .* does not answer")


def test_a_router_that_is_gone_fails_the_request(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_SOON_S)
    routed.router.close()
    routed.router = routed.language.consumer._router = RouterClient("http://127.0.0.1:9", GUARD_S)
    routed.fails(routed.dying_offer(), "the router .* does not answer")


def test_without_a_token_the_router_is_not_asked(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_SOON_S)
    routed.fails(msgspec.structs.replace(routed.dying_offer(), failover_token=None))
    assert routed.stub.calls == []


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
    make_routed: MakeRouted, wrong: Callable[[dict[str, Any]], Any]
) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_SOON_S)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: (200, wrong(msgspec.to_builtins(coordinates)))
    routed.fails(coordinates, "no other producer took over")


def test_redirects_are_not_followed(make_routed: MakeRouted) -> None:
    with StubRouter() as elsewhere:
        location = elsewhere.url + "/ec/failovers/x"
        routed = make_routed(
            peer_timeout=NOTICES_LOSS_SOON_S, failover=lambda token, body: (307, None), location=location
        )
        routed.fails(routed.dying_offer(), "307")
        assert elsewhere.calls == []


def test_proxies_are_not_used(make_routed: MakeRouted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    routed = make_routed(peer_timeout=NOTICES_LOSS_S)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room)
    routed.language.fetch("r", "a", coordinates)
    assert routed.stub.calls


def test_the_answer_to_an_aborted_request_is_not_used(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=NOTICES_LOSS_S, pause=0.2)
    coordinates = routed.dying_offer()
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room)
    assert not routed.language.consumer.require("r", "a", coordinates)
    until(lambda: routed.stub.calls)
    routed.language.consumer.release("r")
    until(lambda: routed.second.produced("items_offered"))
    assert routed.count("transfers", "aborted") == 1
    assert routed.language.consumer.find("a") is None
    assert np.array_equal(routed.language.fetch("s", "a", routed.second.offer("a")), rows_like(0))


def test_a_producer_that_aborts_is_replaced_without_waiting_for_a_time_out(make_routed: MakeRouted) -> None:
    routed = make_routed(peer_timeout=10 * GUARD_S)
    routed.first.publish("a")
    coordinates = routed.first.offer("a", token=TOKEN)
    routed.first.withdraw("a")
    routed.stub.failover = lambda token, body: routed.at_second(coordinates.room)
    assert np.array_equal(routed.language.fetch("r", "a", coordinates), rows_like(0))


def test_the_router_may_name_the_same_producer_again(make_routed: MakeRouted) -> None:
    """It has refused the claim, and is asked for it once more."""
    routed = make_routed()
    routed.first.publish("a")
    coordinates = routed.first.offer("a", token=TOKEN)
    routed.first.withdraw("a")

    def encode_again(token: str, body: dict[str, Any]) -> Answer:
        routed.first.publish("a")
        return answer(routed.first.offer("a", coordinates.room, TOKEN))

    routed.stub.failover = encode_again
    assert np.array_equal(routed.language.fetch("r", "a", coordinates), rows_like(0))
    until(lambda: routed.first.producer.offers.nbytes == 0)


def test_the_reason_of_a_failure_is_reported(make_routed: MakeRouted) -> None:
    routed = make_routed()
    routed.router.report_failure(TOKEN, IntegrityError("it is damaged")).result(GUARD_S)
    body = {"code": "integrity_error", "message": "it is damaged", "retryable": False}
    assert routed.stub.calls == [("failures", TOKEN, body)]


def test_a_report_to_an_absent_router_raises_nothing() -> None:
    router = RouterClient("http://127.0.0.1:9", 1.0)
    assert router.report_failure(TOKEN, PeerGone("gone")).exception(GUARD_S) is None
    router.close()


def test_a_token_cannot_change_the_path(make_routed: MakeRouted) -> None:
    routed = make_routed()
    routed.router.report_failure("../x?y", PeerGone("gone")).result(GUARD_S)
    assert routed.stub.calls[0][1] == "..%2Fx%3Fy"
