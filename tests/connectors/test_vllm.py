"""vLLM's own engines, split by our connector, beside the undivided engine: the same tokens, image by image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from embferry.testing.proxy import ChaosProxy

from .engines import Engine, picture, reference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]

TEXT = {"type": "text", "text": "What is this?"}
POOL_TOKENS = 32
POOL = {"num_blocks": 4, "block_size": 8}
"""Smaller than any picture here: of 48 tokens, or 1,024."""


def transfer(role: str, **extra: Any) -> dict[str, Any]:
    return {
        "ec_connector": "EmbferryConnector",
        "ec_connector_module_path": "embferry.connectors.vllm.connector",
        "ec_role": role,
        "ec_connector_extra_config": POOL | extra,
    }


@dataclass
class Engines:
    model: Path
    producer: Engine
    consumer: Engine
    undivided: Engine

    def split(self, *items: dict[str, Any]) -> dict[str, Any]:
        params = self.encode(*items)
        return self.answer(params, *items)

    def encode(self, *items: dict[str, Any]) -> dict[str, Any]:
        params: dict[str, Any] = self.producer.ask(*items)["params"]
        assert len(params) == len({item["uuid"] for item in items})
        return params

    def answer(self, params: dict[str, Any], *items: dict[str, Any]) -> dict[str, Any]:
        by_uuid = {item["uuid"]: params[next(key for key in params if item["uuid"] in key)] for item in items}
        references = [reference(item, by_uuid[item["uuid"]]) for item in items]
        return self.consumer.ask(*references, TEXT, params=params)


@pytest.fixture(scope="module", params=["shm", "tcp"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    from .tiny_qwen import make

    folder: Path = tmp_path_factory.mktemp("vllm")
    make(folder / "model")
    roads = {"transports": [request.param]}
    made = Engines(
        folder / "model",
        Engine(folder / "model", folder / "producer.log", transfer("ec_producer", **roads)),
        Engine(folder / "model", folder / "consumer.log", transfer("ec_consumer", **roads)),
        Engine(folder / "model", folder / "undivided.log"),
    )
    try:
        for engine in (made.producer, made.consumer, made.undivided):
            engine.started()
        yield made
    finally:
        parts = (made.producer, made.consumer, made.undivided)
        for engine in parts:
            engine.end()
        for engine in parts:
            engine.close()


@pytest.mark.parametrize("seed", range(1, 7))
def test_tokens_are_those_of_the_undivided_engine(engines: Engines, seed: int) -> None:
    item = picture(seed)
    params = engines.encode(item)
    assert next(iter(params.values()))["embferry"]["tokens"] > POOL_TOKENS
    split, whole = engines.answer(params, item), engines.undivided.ask(item, TEXT)
    assert len(whole["tokens"]) == 16
    assert split["tokens"] == whole["tokens"]


def test_a_large_one_and_several_in_one_request(engines: Engines) -> None:
    large, several = [picture(8, 896, 896)], [picture(seed) for seed in (11, 12, 13)]
    for items in (large, several):
        assert engines.split(*items)["tokens"] == engines.undivided.ask(*items, TEXT)["tokens"]


def test_answers_differ_between_pictures(engines: Engines) -> None:
    assert len({tuple(engines.split(picture(seed))["tokens"]) for seed in (21, 22, 23)}) > 1


def test_the_same_picture_again(engines: Engines) -> None:
    item = picture(31)
    assert engines.split(item)["tokens"] == engines.split(item)["tokens"] == engines.undivided.ask(item, TEXT)["tokens"]


def broken(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Of each item's coordinates, some are something else."""
    return {key: entry | {"embferry": entry["embferry"] | changes} for key, entry in params.items()}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"room": 7}, r"\[\w+\]"),
        ({"endpoint": "tcp://127.0.0.1:9"}, r"\[\w+\]"),
        ({"tokens": 49}, "49 tokens where the prompt has room for 48"),
        ({"width": 257}, "layout_mismatch"),
        ({"dtype": "bfloat16"}, "layout_mismatch"),
        ({"digest": "00" * 16}, "integrity_error"),
        ({"version": 2}, "version 2"),
    ],
)
def test_a_request_fails_alone_and_at_once(engines: Engines, changes: dict[str, Any], why: str) -> None:
    item = picture(41 + len(str(changes)))
    failed = engines.answer(broken(engines.encode(item), **changes), item)
    assert failed["reason"] == "error"
    assert failed["seconds"] < 2
    assert re.search(f"its embedding cannot be had: .*{why}", engines.consumer.log.read_text())
    assert engines.split(item)["tokens"] == engines.undivided.ask(item, TEXT)["tokens"]


def test_a_connection_that_is_cut_in_the_middle(engines: Engines) -> None:
    item = picture(9, 896, 896)
    params = engines.encode(item)
    endpoint = next(iter(params.values()))["embferry"]["endpoint"]
    with ChaosProxy(int(endpoint.rpartition(":")[2]), cut_after=2000, times=2) as proxy:
        answer = engines.answer(broken(params, endpoint=f"tcp://127.0.0.1:{proxy.port}"), item)
        assert proxy.cuts == 2
    assert answer["tokens"] == engines.undivided.ask(item, TEXT)["tokens"]


def test_an_embedding_that_nobody_has(engines: Engines) -> None:
    item = picture(51)
    nowhere = {key: {"metadata": entry["metadata"]} for key, entry in engines.encode(item).items()}
    failed = engines.answer(nowhere, item)
    assert failed["reason"] == "error"
    assert failed["seconds"] < 2
    assert "nobody says where the embedding" in engines.consumer.log.read_text()
    assert engines.split(item)["tokens"] == engines.undivided.ask(item, TEXT)["tokens"]


def test_a_producer_that_was_killed(engines: Engines) -> None:
    """The last one here: another producer takes its place."""
    item = picture(61)
    params = engines.encode(item)
    old = engines.producer
    old.kill()
    failed = engines.answer(params, item)
    engines.producer = Engine(engines.model, old.log.with_name("another.log"), old.transfer)
    old.close()
    assert failed["reason"] == "error"
    assert failed["seconds"] < 2
    engines.producer.started()
    assert engines.split(item)["tokens"] == engines.undivided.ask(item, TEXT)["tokens"]
