"""What goes wrong between vLLM's own engines: cut, damaged, killed in the middle, nobody left, too much promised."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from embferry.testing.proxy import ChaosProxy

from .cable import LISTENS, TRANSPORT, Cable, ports_at
from .engines import Content, Engine, picture, reference
from .split import TEXT, broken, transfer
from .stub_router import Answer, StubRouter

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(300)]

TOKEN_BYTES = 256 * 4
LARGE_TOKENS = 1024
LARGE = LARGE_TOKENS * TOKEN_BYTES
"""An embedding of a picture of 896 × 896; the pool has 32 tokens."""
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
    cable: Cable
    names: dict[str, str] = field(default_factory=dict)  # vLLM's, by uuid

    def encode(self, item: Content, engine: Engine | None = None, room: int | None = None) -> dict[str, Any]:
        """The one item's entry."""
        wish = None if room is None else {"embferry": {"room": room}}
        params: dict[str, Any] = (engine or self.first).ask(item, params=wish)["params"]
        ((name, entry),) = params.items()
        self.names[item["uuid"]] = name
        return entry

    def answer(self, item: Content, entry: dict[str, Any], **changes: Any) -> dict[str, Any]:
        params = broken({self.names[item["uuid"]]: entry}, replacement=TOKEN, **changes)
        return self.consumer.ask(reference(item, entry), TEXT, params=params)

    def whole(self, item: Content) -> list[int]:
        tokens: list[int] = self.undivided.ask(item, TEXT)["tokens"]
        return tokens

    def again_at_the_second(self, item: Content, room: int) -> None:
        """The router has it encoded there, when it is asked."""

        def replace(token: str, said: dict[str, Any]) -> Answer:
            entry = self.encode(item, self.second, room)
            return 200, {"embferry": entry["embferry"] | {"replacement": token}}

        self.router.replace = replace

    def metrics(self) -> dict[str, float]:
        """The consumer's, by name and labels."""
        with urllib.request.urlopen(f"http://{LISTENS}:{self.metrics_port}/metrics", timeout=5) as response:
            text = response.read().decode()
        found = re.findall(r"^embferry_ec_(\S+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


def free_port() -> int:
    with socket.create_server((LISTENS, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def lead_through(stage: Stage) -> Cable:
    """A first transfer cannot reach the consumer; but then it listens."""
    before = ports_at(LISTENS)
    stage.router.replace = lambda token, said: (503, {"error": {"message": "not yet"}})
    item = picture(1)
    assert stage.answer(item, stage.encode(item))["reason"] == "error"
    (port,) = ports_at(LISTENS) - before
    return Cable(port)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    from embferry.models.tiny_qwen import make  # brings torch and transformers with it

    folder: Path = tmp_path_factory.mktemp("faults")
    model = folder / "model"
    make(model)
    port = free_port()
    sends = {"transports": ["tcp"], "offered_bytes": LARGE + LARGE // 2}
    with StubRouter() as router:
        takes = TRANSPORT | {"router": router.url, "metrics_port": port, "encode_on_failure": True}
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
            made = Stage(*engines, router, port, None)  # type: ignore[arg-type]  # it follows
            made.cable = lead_through(made)
            yield made
        finally:
            if made is not None and made.cable is not None:
                made.cable.close()
            for engine in engines:
                engine.end()
            for engine in engines:
                engine.close()


def test_a_data_connection_that_is_cut_in_the_middle(stage: Stage) -> None:
    item = picture(2, 896, 896)
    entry, before = stage.encode(item), stage.metrics()
    cuts: list[int] = []

    def cut(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and not cuts:
            cuts.append(carried)
        return carried <= MIDDLE or len(stage.cable.carried) > 1

    stage.cable.new(cut)
    answer = stage.answer(item, entry)
    assert len(cuts) == 1
    assert answer["tokens"] == stage.whole(item)
    assert len(stage.cable.carried) == 2
    after = stage.metrics()
    assert after["embedding_bytes_total"] - before["embedding_bytes_total"] == LARGE
    assert after["wire_bytes_total"] - before["wire_bytes_total"] < 2 * LARGE - MIDDLE


def test_bytes_that_are_damaged_are_sent_again(stage: Stage) -> None:
    item = picture(3, 896, 896)
    entry, before = stage.encode(item), stage.metrics()
    damaged: list[int] = []

    def damage(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and not damaged:
            damaged.append(carried)
            data[len(data) // 2] ^= 0xFF
        return True

    stage.cable.new(damage)
    answer = stage.answer(item, entry)
    assert len(damaged) == 1
    assert answer["tokens"] == stage.whole(item)
    after = stage.metrics()
    assert after["bytes_sent_twice_total"] > before["bytes_sent_twice_total"]


def test_nobody_goes_on(stage: Stage) -> None:
    """It fails within 2 s, the router knows why before, and the next request is right."""
    item = picture(4, 896, 896)
    entry, asked = stage.encode(item), len(stage.router.asked)
    stage.cable.new()
    stage.router.replace = lambda token, said: (503, {"error": {"message": "no other encoder"}})
    port = int(entry["embferry"]["endpoint"].rpartition(":")[2])
    with ChaosProxy(port, cut_after=1500, dies=True) as proxy:
        failed = stage.answer(item, entry, endpoint=f"tcp://127.0.0.1:{proxy.port}")
    assert failed["reason"] == "error"
    assert failed["seconds"] < 2
    kinds = [(kind, token, said["code"]) for kind, token, said in stage.router.asked[asked:]]
    assert kinds == [("replacements", TOKEN, "peer_gone"), ("failures", TOKEN, "peer_gone")]
    assert "no other encoder" in stage.router.asked[-1][2]["message"]
    assert stage.metrics()['failures_total{code="peer_gone"}'] >= 1
    assert stage.answer(item, entry)["tokens"] == stage.whole(item)


def test_the_consumer_encodes_it_itself_if_it_has_the_pixels(stage: Stage) -> None:
    item = picture(5)
    entry, before = stage.encode(item), stage.metrics()
    params = broken({stage.names[item["uuid"]]: entry}, room=7)
    answer = stage.consumer.ask(item, TEXT, params=params)
    assert answer["tokens"] == stage.whole(item)
    assert stage.metrics()["encoded_here_total"] == before["encoded_here_total"] + 1


def test_a_budget_that_is_full_refuses_with_a_reason(stage: Stage) -> None:
    held, other = picture(6, 896, 896), picture(7, 896, 896)
    entry = stage.encode(held)
    refused = stage.encode(other)
    assert "embferry" not in refused
    assert refused["embferry_refused"]["code"] == "capacity_exhausted"
    assert "raise offered_bytes" in refused["embferry_refused"]["message"]
    assert stage.answer(held, entry)["tokens"] == stage.whole(held)
    entry = stage.encode(other)  # its place is free again
    assert stage.answer(other, entry)["tokens"] == stage.whole(other)


def test_what_nobody_offers_is_here_or_is_asked_for(stage: Stage) -> None:
    item, room = picture(9), 77  # small: what the first one offers meanwhile is never fetched
    entry, before = stage.encode(item), stage.metrics()
    stage.cable.new()
    stage.again_at_the_second(item, room)
    asked = len(stage.router.asked)
    for _ in range(2):
        assert stage.answer(item, entry, endpoint=None, room=room)["tokens"] == stage.whole(item)
    assert [kind for kind, _, _ in stage.router.asked[asked:]] == ["replacements"]  # the second time it was here
    after = stage.metrics()
    assert after["asked_again_total"] - before["asked_again_total"] == 1
    assert after["cache_hits_total"] - before["cache_hits_total"] == 1
    tokens = entry["embferry"]["tokens"]
    assert after["embedding_bytes_total"] - before["embedding_bytes_total"] == tokens * TOKEN_BYTES


def test_what_nobody_offers_and_nobody_has_fails_alone(stage: Stage) -> None:
    item = picture(10)
    entry, asked = stage.encode(item), len(stage.router.asked)
    stage.router.replace = lambda token, said: (503, {"error": {"message": "no encoder"}})
    failed = stage.answer(item, entry, endpoint=None, room=78)
    assert failed["reason"] == "error"
    assert failed["seconds"] < 2
    assert [kind for kind, _, _ in stage.router.asked[asked:]] == ["replacements", "failures"]
    assert "cannot be had again" in stage.router.asked[-1][2]["message"]
    stage.cable.new()
    assert stage.answer(item, entry)["tokens"] == stage.whole(item)


def test_a_producer_that_is_killed_in_the_middle_is_replaced(stage: Stage) -> None:
    """The last one here. What had arrived is not sent again."""
    item = picture(8, 896, 896)
    entry, before = stage.encode(item), stage.metrics()
    room = entry["embferry"]["room"]
    stage.again_at_the_second(item, room)

    def kill(carried: int, data: bytearray) -> bool:
        if carried > MIDDLE and len(stage.cable.carried) == 1:
            stage.first.kill()
            return False
        return True

    stage.cable.new(kill)
    answer = stage.answer(item, entry)
    assert stage.router.asked[-1][0] == "replacements"
    assert answer["tokens"] == stage.whole(item)
    after = stage.metrics()
    by_first, by_second = stage.cable.carried
    assert by_first > MIDDLE
    assert by_second < LARGE - MIDDLE + LARGE // 10
    for name, more in {
        'replacements_total{outcome="found"}': 1,
        "embedding_bytes_total": LARGE,
        "wire_bytes_total": LARGE,
        "bytes_sent_twice_total": 0,
    }.items():
        assert after[name] - before.get(name, 0) == more
