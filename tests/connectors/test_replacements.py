"""A producer is lost in the middle: the router names another one, and the consumer goes on where it stood."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry.connectors.vllm.coordinates import KEY, Coordinates
from embferry.connectors.vllm.router import Router
from embferry.protocol.errors import EmbeddingTransferError, IntegrityError, PeerGone
from embferry.testing.proxy import ChaosProxy

from .pair import CONFIG, NBYTES, Encode, Language, rows_like, until
from .stub_router import Answer, StubRouter

pytestmark = pytest.mark.integration

TCP = msgspec.structs.replace(CONFIG, transports=("tcp",))
TOKEN = "the-token"


class Stage:
    """Two producers, a consumer, and the router between them. The first one dies when a part has arrived."""

    def __init__(self, router: StubRouter, wait_s: float = 5.0) -> None:
        self.stub = router
        self.first, self.second = Encode(TCP), Encode(TCP)
        self.router = Router(router.url, wait_s)
        self.language = Language(TCP, self.router)
        self.proxies: list[ChaosProxy] = []

    def begin(self, mm_hash: str = "a") -> Coordinates:
        """The coordinates of an embedding that comes to a stop in the middle."""
        self.first.publish(mm_hash)
        where = self.first.where(mm_hash, token=TOKEN)
        proxy = ChaosProxy(int(where.endpoint.rpartition(":")[2]), cut_after=1500, dies=True)
        proxy.__enter__()
        self.proxies.append(proxy)
        return msgspec.structs.replace(where, endpoint=f"tcp://127.0.0.1:{proxy.port}")

    def offered_again(self, room: int, mm_hash: str = "a", seed: int = 0) -> Answer:
        self.second.publish(mm_hash, seed)
        return 200, {KEY: msgspec.to_builtins(self.second.where(mm_hash, room, TOKEN))}

    def fails(self, where: Coordinates, error: type[EmbeddingTransferError], match: str) -> float:
        """How long that takes, seconds."""
        began = time.monotonic()
        with pytest.raises(error, match=match):
            self.language.fetch("r", "a", where)
        return time.monotonic() - began

    def close(self) -> None:
        for part in (self.first, self.second, self.language, self.router):
            part.close()
        for proxy in self.proxies:
            proxy.__exit__()


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
        stage.stub.__exit__()


def test_it_goes_on_where_it_stood(staging: Staging) -> None:
    stage = staging()
    where = stage.begin()
    stage.stub.replace = lambda token, said: stage.offered_again(where.room)
    rows = stage.language.fetch("r", "a", where)
    assert np.array_equal(rows, rows_like(0))
    ((_, token, said),) = stage.stub.of("replacements")
    assert token == TOKEN
    assert said["code"] == "peer_gone"
    assert said["endpoint"] == where.endpoint
    count = stage.language.count
    assert (count("losses", "peer_gone"), count("replacements", "found"), count("transfers", "success")) == (1, 1, 1)
    assert count("bytes_sent_twice") == 0
    assert count("wire_bytes") == NBYTES


def test_another_content_comes_whole(staging: Staging) -> None:
    stage = staging()
    where = stage.begin()
    stage.stub.replace = lambda token, said: stage.offered_again(where.room, seed=5)
    assert np.array_equal(stage.language.fetch("r", "a", where), rows_like(5))


def test_progress_needs_nobody_to_ask(staging: Staging) -> None:
    """vLLM's loop may be in a long step."""
    stage = staging()
    where = stage.begin()
    stage.stub.replace = lambda token, said: stage.offered_again(where.room)
    assert not stage.language.consumer.want("r", "a", where)
    until(lambda: stage.second.tally.read().counts.get(("offers_ended", "fetched")) == 1)
    assert stage.language.consumer.want("r", "a", where)


def test_the_router_is_asked_once_for_each_loss(staging: Staging) -> None:
    """The last chunks may still be looked at while it is asked."""
    stage = staging(pause=0.3)
    where = stage.begin()
    stage.stub.replace = lambda token, said: stage.offered_again(where.room)
    assert not stage.language.consumer.want("r", "a", where)
    until(lambda: bool(stage.stub.asked))
    arrival = stage.language.consumer._arrivals["a"]
    assert arrival._receiver is not None
    arrival._changed(arrival._receiver)
    stage.language.fetch("r", "a", where)
    assert len(stage.stub.asked) == 1


@pytest.mark.parametrize("status", [404, 503])
def test_the_router_has_nobody(staging: Staging, status: int) -> None:
    stage = staging(replace=lambda token, said: (status, {"error": {"message": "no other encoder"}}))
    seconds = stage.fails(stage.begin(), PeerGone, rf"token \d+.*no other producer went on.*{status}: no other encoder")
    assert seconds < 2
    assert stage.language.count("replacements", "none") == 1


def test_the_router_says_nothing(staging: Staging) -> None:
    stage = staging(wait_s=0.3, pause=30.0)
    assert stage.fails(stage.begin(), PeerGone, "no other producer went on: the router .* does not answer") < 2


def test_the_router_is_dead(staging: Staging) -> None:
    stage = staging()
    stage.router.close()
    stage.router = stage.language.consumer._router = Router("http://127.0.0.1:9", 5.0)
    assert stage.fails(stage.begin(), PeerGone, "the router .* does not answer") < 2


def test_without_a_token_nobody_is_asked(staging: Staging) -> None:
    stage = staging()
    stage.fails(msgspec.structs.replace(stage.begin(), replacement=None), PeerGone, "encode worker")
    assert stage.stub.asked == []


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda where: b"<html>",
    "no coordinates": lambda where: {},
    "malformed ones": lambda where: {KEY: {"room": 7}},
    "another room": lambda where: {KEY: where | {"room": 7}},
    "another length": lambda where: {KEY: where | {"tokens": 1}},
    "another width": lambda where: {KEY: where | {"width": 1}},
    "no endpoint": lambda where: {KEY: where | {"endpoint": "http://x"}},
    "too long an answer": lambda where: b" " * (1 << 17),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_answers_that_cannot_be(staging: Staging, wrong: Callable[[dict[str, Any]], Any]) -> None:
    stage = staging()
    where = stage.begin()
    stage.stub.replace = lambda token, said: (200, wrong(msgspec.to_builtins(where)))
    assert stage.fails(where, PeerGone, "no other producer went on") < 2


def test_no_redirect_is_followed(staging: Staging) -> None:
    with StubRouter() as elsewhere:
        stage = staging(replace=lambda token, said: (307, None), location=elsewhere.url + "/ec/replacements/x")
        stage.fails(stage.begin(), PeerGone, "it answered 307")
        assert elsewhere.asked == []


def test_no_proxy_is_used(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    stage = staging()
    where = stage.begin()
    stage.stub.replace = lambda token, said: stage.offered_again(where.room)
    stage.language.fetch("r", "a", where)
    assert stage.stub.asked, "the stub was not reached"


def test_a_request_that_is_given_up_meanwhile(staging: Staging) -> None:
    stage = staging(pause=0.2)
    where = stage.begin()
    stage.stub.replace = lambda token, said: stage.offered_again(where.room)
    assert not stage.language.consumer.want("r", "a", where)
    until(lambda: bool(stage.stub.asked))
    stage.language.consumer.finished("r")
    until(lambda: ("items_offered", "") in stage.second.tally.read().counts)
    assert stage.language.count("transfers", "aborted") == 1
    assert not stage.language.consumer.is_here("a")
    assert np.array_equal(stage.language.fetch("s", "a", stage.second.where("a")), rows_like(0))


def test_a_producer_that_says_it_ends_is_replaced_at_once(staging: Staging) -> None:
    stage = staging()
    stage.first.publish("a")
    where = stage.first.where("a", token=TOKEN)
    sender = stage.first.producer._rooms[where.room][0]
    sender.abort()
    stage.stub.replace = lambda token, said: stage.offered_again(where.room)
    began = time.monotonic()
    assert np.array_equal(stage.language.fetch("r", "a", where), rows_like(0))
    assert time.monotonic() - began < TCP.peer_timeout


def test_the_same_producer_may_be_named_again(staging: Staging) -> None:
    """Its room has ended; it is opened once more."""
    stage = staging()
    stage.first.publish("a")
    where = stage.first.where("a", token=TOKEN)
    stage.first.producer._rooms[where.room][0].abort()
    stage.stub.replace = lambda token, said: (
        200,
        {KEY: msgspec.to_builtins(stage.first.where("a", where.room, TOKEN))},
    )
    assert np.array_equal(stage.language.fetch("r", "a", where), rows_like(0))
    assert stage.first.producer.offers.nbytes in (0, NBYTES)
    until(lambda: stage.first.producer.offers.nbytes == 0)


def test_why_an_embedding_failed_is_told(staging: Staging) -> None:
    stage = staging()
    told = stage.router.failed(TOKEN, IntegrityError("it is damaged"))
    told.result(5)
    said = {"code": "integrity_error", "message": "it is damaged", "retryable": False}
    assert stage.stub.asked == [("failures", TOKEN, said)]


def test_that_nobody_listens_is_no_error() -> None:
    router = Router("http://127.0.0.1:9", 1.0)
    told = router.failed(TOKEN, PeerGone("gone"))
    assert told.exception(5) is None
    router.close()


def test_a_token_is_no_path(staging: Staging) -> None:
    stage = staging()
    stage.router.failed("../x?y", PeerGone("gone")).result(5)
    assert stage.stub.asked[0][1] == "..%2Fx%3Fy"
