"""Faults between vLLM's own engines: cut connections, damaged bytes, killed or missing producers, full budgets."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from embferry.testing.proxy import ChaosProxy
from tests.ports import free_port

from .engines import Content, Engine, picture, reference
from .faulty_link import LISTENS, TRANSPORT, FaultyLink, ports_at
from .pair import GUARD_S
from .split import TEXT, broken, transfer
from .stub_router import Answer, StubRouter

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]

TOKEN_BYTES = 256 * 4
LARGE_TOKENS = 1024
LARGE = LARGE_TOKENS * TOKEN_BYTES
"""Bytes of the embedding of a picture of 896 × 896. The pool has 32 tokens."""
MIDDLE = LARGE // 3
TOKEN = "a-token"


@dataclass
class Stage:
    first: Engine
    second: Engine
    consumer: Engine
    undivided: Engine
    router: StubRouter
    metrics_port: int
    link: FaultyLink
    names: dict[str, str] = field(default_factory=dict)  # vLLM's name of each item, by uuid

    def encode(self, item: Content, engine: Engine | None = None, room: int | None = None) -> dict[str, Any]:
        """Returns the item's entry in the parameters."""
        room_request = None if room is None else {"embferry": {"room": room}}
        params: dict[str, Any] = (engine or self.first).ask(item, params=room_request)["params"]
        ((name, entry),) = params.items()
        self.names[item["uuid"]] = name
        return entry

    def answer(self, item: Content, entry: dict[str, Any], **changes: Any) -> dict[str, Any]:
        params = broken({self.names[item["uuid"]]: entry}, failover_token=TOKEN, **changes)
        return self.consumer.ask(reference(item, entry), TEXT, params=params)

    def whole(self, item: Content) -> list[int]:
        tokens: list[int] = self.undivided.ask(item, TEXT)["tokens"]
        return tokens

    def fail_over_to_second(self, item: Content, room: int) -> None:
        """Makes the router have the item encoded at the second producer when it is asked."""

        def failover(token: str, body: dict[str, Any]) -> Answer:
            entry = self.encode(item, self.second, room)
            return 200, {"embferry": entry["embferry"] | {"failover_token": token}}

        self.router.failover = failover

    def metrics(self) -> dict[str, float]:
        """Returns the consumer's metrics by name and labels."""
        with urllib.request.urlopen(f"http://{LISTENS}:{self.metrics_port}/metrics", timeout=GUARD_S) as response:
            text = response.read().decode()
        found = re.findall(r"^embferry_connector_(\S+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


def insert_link(stage: Stage) -> FaultyLink:
    """Starts a first transfer, which makes the consumer listen and fails, and puts the link before its port."""
    before = ports_at(LISTENS)
    stage.router.failover = lambda token, body: (503, {"error": {"message": "not yet"}})
    item = picture(1)
    assert stage.answer(item, stage.encode(item))["reason"] == "error"
    (port,) = ports_at(LISTENS) - before
    return FaultyLink(port)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    from embferry.models.tiny_qwen import make  # brings torch and transformers with it

    folder: Path = tmp_path_factory.mktemp("faults")
    model = folder / "model"
    make(model)
    port = free_port(LISTENS)
    sends = {"transports": ["tcp"], "offered_bytes": LARGE + LARGE // 2}
    with StubRouter() as router:
        takes = TRANSPORT | {
            "router": router.url,
            "failover_timeout": GUARD_S,
            "metrics_port": port,
        }
        engines = [
            Engine(model, folder / "first.log", transfer("ec_producer", **sends)),
            Engine(model, folder / "second.log", transfer("ec_producer", **sends)),
            Engine(model, folder / "consumer.log", transfer("ec_consumer", **takes)),
            Engine(model, folder / "undivided.log"),
        ]
        made = None
        try:
            for engine in engines:
                engine.started()
            made = Stage(*engines, router, port, None)  # type: ignore[arg-type]  # set below
            made.link = insert_link(made)
            yield made
        finally:
            if made is not None and made.link is not None:
                made.link.close()
            for engine in engines:
                engine.end()
            for engine in engines:
                engine.close()


def test_a_transfer_survives_a_cut_data_connection(stage: Stage) -> None:
    item = picture(2, 896, 896)
    entry, before = stage.encode(item), stage.metrics()
    cuts: list[int] = []

    def cut(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and not cuts:
            cuts.append(carried)
        return carried <= MIDDLE or len(stage.link.carried) > 1

    stage.link.new(cut)
    answer = stage.answer(item, entry)
    assert len(cuts) == 1
    assert answer["tokens"] == stage.whole(item)
    assert len(stage.link.carried) == 2
    after = stage.metrics()
    assert after["embedding_bytes_total"] - before["embedding_bytes_total"] == LARGE
    assert after["wire_bytes_total"] - before["wire_bytes_total"] < 2 * LARGE - MIDDLE


def test_damaged_bytes_are_sent_again(stage: Stage) -> None:
    item = picture(3, 896, 896)
    entry, before = stage.encode(item), stage.metrics()
    damaged: list[int] = []

    def damage(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and not damaged:
            damaged.append(carried)
            data[len(data) // 2] ^= 0xFF
        return True

    stage.link.new(damage)
    answer = stage.answer(item, entry)
    assert len(damaged) == 1
    assert answer["tokens"] == stage.whole(item)
    after = stage.metrics()
    assert after["repeated_bytes_total"] > before["repeated_bytes_total"]


def test_without_another_producer_the_request_fails_alone(stage: Stage) -> None:
    """The router is told why before vLLM fails the request, and the next request succeeds."""
    item = picture(4, 896, 896)
    entry, before = stage.encode(item), len(stage.router.calls)
    stage.link.new()
    stage.router.failover = lambda token, body: (503, {"error": {"message": "no other encoder"}})
    port = int(entry["embferry"]["endpoint"].rpartition(":")[2])
    with ChaosProxy(port, cut_after=1500, dies=True) as proxy:
        failed = stage.answer(item, entry, endpoint=f"tcp://127.0.0.1:{proxy.port}")
    assert failed["reason"] == "error"
    kinds = [(kind, token, body["code"]) for kind, token, body in stage.router.calls[before:]]
    assert kinds == [("failovers", TOKEN, "peer_gone"), ("failures", TOKEN, "peer_gone")]
    assert "no other encoder" in stage.router.calls[-1][2]["message"]
    assert stage.metrics()['failures_total{code="peer_gone"}'] >= 1
    assert stage.answer(item, entry)["tokens"] == stage.whole(item)


def test_a_consumer_with_the_pixels_encodes_the_item_itself(stage: Stage) -> None:
    item = picture(5)
    entry, before = stage.encode(item), stage.metrics()
    params = broken({stage.names[item["uuid"]]: entry}, room=7)
    answer = stage.consumer.ask(item, TEXT, params=params)
    assert answer["tokens"] == stage.whole(item)
    assert stage.metrics()["encoded_here_total"] == before["encoded_here_total"] + 1


def test_an_offer_beyond_the_budget_is_refused_with_a_reason(stage: Stage) -> None:
    held, other = picture(6, 896, 896), picture(7, 896, 896)
    entry = stage.encode(held)
    refused = stage.encode(other)
    assert "embferry" not in refused
    assert refused["embferry_refused"]["code"] == "capacity_exhausted"
    assert "offered_bytes" in refused["embferry_refused"]["message"]
    assert stage.answer(held, entry)["tokens"] == stage.whole(held)
    entry = stage.encode(other)  # the budget has room again
    assert stage.answer(other, entry)["tokens"] == stage.whole(other)


def test_an_unoffered_embedding_is_requested_unless_it_is_here(stage: Stage) -> None:
    item, room = picture(9), 77  # small, because the first producer's offer is never fetched
    entry, before = stage.encode(item), stage.metrics()
    stage.link.new()
    stage.fail_over_to_second(item, room)
    calls = len(stage.router.calls)
    for _ in range(2):
        assert stage.answer(item, entry, endpoint=None, room=room)["tokens"] == stage.whole(item)
    assert [kind for kind, _, _ in stage.router.calls[calls:]] == ["failovers"], "the second time it was here"
    after = stage.metrics()
    assert after["asked_again_total"] - before["asked_again_total"] == 1
    assert after["cache_hits_total"] - before["cache_hits_total"] == 1
    tokens = entry["embferry"]["tokens"]
    assert after["embedding_bytes_total"] - before["embedding_bytes_total"] == tokens * TOKEN_BYTES


def test_an_unoffered_embedding_without_a_producer_fails_the_request_alone(stage: Stage) -> None:
    item = picture(10)
    entry, before = stage.encode(item), len(stage.router.calls)
    stage.router.failover = lambda token, body: (503, {"error": {"message": "no encoder"}})
    failed = stage.answer(item, entry, endpoint=None, room=78)
    assert failed["reason"] == "error"
    assert [kind for kind, _, _ in stage.router.calls[before:]] == ["failovers", "failures"]
    assert "cannot be obtained again" in stage.router.calls[-1][2]["message"]
    stage.link.new()
    assert stage.answer(item, entry)["tokens"] == stage.whole(item)


def test_another_producer_takes_over_when_one_is_killed_in_the_middle(stage: Stage) -> None:
    """Nothing is sent twice. Must run last in this file: it kills the first producer."""
    item = picture(8, 896, 896)
    entry, before = stage.encode(item), stage.metrics()
    room = entry["embferry"]["room"]
    stage.fail_over_to_second(item, room)

    def kill(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and len(stage.link.carried) == 1:
            stage.first.kill()
            return False
        return True

    stage.link.new(kill)
    answer = stage.answer(item, entry)
    assert stage.router.calls[-1][0] == "failovers"
    assert answer["tokens"] == stage.whole(item)
    after = stage.metrics()
    by_first, by_second = stage.link.carried
    assert by_first > MIDDLE
    assert by_second < LARGE - MIDDLE + LARGE // 10
    for name, more in {
        'failovers_total{outcome="found"}': 1,
        "embedding_bytes_total": LARGE,
        "wire_bytes_total": LARGE,
        "repeated_bytes_total": 0,
    }.items():
        assert after[name] - before.get(name, 0) == more
