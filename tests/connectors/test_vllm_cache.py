"""A producer that was restarted encodes nothing that any producer has encoded before, and the tokens are the same."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ports import free_port

from .engines import Engine, picture
from .pair import GUARD_S
from .split import Engines, transfer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

Count = Callable[[], dict[str, float]]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def engines(port: int, tmp_path: Path) -> Iterator[Engines]:
    from embferry.models.tiny_qwen import make

    make(tmp_path / "model")
    cache = {"url": (tmp_path / "cache").as_uri(), "lookup_timeout": GUARD_S}
    configs = {
        "producer": transfer("ec_producer", transports=["tcp"], metrics_port=port, cache=cache),
        "consumer": transfer("ec_consumer", transports=["tcp"]),
        "undivided": None,
    }
    made = Engines(
        tmp_path / "model",
        **{name: Engine(tmp_path / "model", tmp_path / f"{name}.log", config) for name, config in configs.items()},
    )
    try:
        for engine in (made.producer, made.consumer, made.undivided):
            engine.started()
        yield made
    finally:
        for engine in (made.producer, made.consumer, made.undivided):
            engine.close()


def counted(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=GUARD_S) as response:
        found = re.findall(
            r"^embferry_connector_(\w+?)(?:_total)?(?:{.*})? (\S+)$", response.read().decode(), re.MULTILINE
        )
    return {name: float(value) for name, value in found}


def test_a_restart_of_an_encoder_costs_no_encode(engines: Engines, port: int, tmp_path: Path) -> None:
    items = [picture(1), picture(2, 448, 336)]
    expected = [engines.whole(item)["tokens"] for item in items]
    assert [engines.split(item)["tokens"] for item in items] == expected
    before = counted(port)
    assert (before["items_encoded"], before.get("shared_cache_hits", 0)) == (2, 0)

    old = engines.producer
    old.close()  # waits for what is being written
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    engines.producer = Engine(engines.model, old.log.with_name("again.log"), old.transfer)
    engines.producer.started()
    assert [engines.split(item)["tokens"] for item in items] == expected
    after = counted(port)
    assert (after["items_encoded"], after["shared_cache_hits"], after["encodes_saved"]) == (0, 2, 2)

    damaged = files[0].read_bytes()
    files[0].write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    engines.producer.close()
    engines.producer = Engine(engines.model, old.log.with_name("third.log"), old.transfer)
    engines.producer.started()
    assert [engines.split(item)["tokens"] for item in items] == expected
    after = counted(port)
    assert (after["items_encoded"], after["shared_cache_hits"]) == (1, 1)
