"""vLLM's own engines, split by our connector, return the same tokens as an undivided engine."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from embferry.testing.proxy import ChaosProxy

from .engines import Engine, picture
from .split import POOL_TOKENS, Engines, broken, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    from embferry.models.tiny_qwen import make

    with running(tmp_path_factory.mktemp("vllm"), make, ["tcp"]) as made:
        yield made


@pytest.mark.parametrize("seed", range(1, 7))
def test_tokens_are_those_of_the_undivided_engine(engines: Engines, seed: int) -> None:
    item = picture(seed)
    params = engines.encode(item)
    assert next(iter(params.values()))["embferry"]["tokens"] > POOL_TOKENS
    before = engines.consumer.refresh()["transfers"]
    split, whole = engines.answer(params, item), engines.whole(item)
    assert engines.consumer.status["transfers"] == before + 1
    assert len(whole["tokens"]) == 16
    assert split["tokens"] == whole["tokens"]


def test_a_large_picture_and_several_in_one_request(engines: Engines) -> None:
    large, several = [picture(8, 896, 896)], [picture(seed) for seed in (11, 12, 13)]
    for items in (large, several):
        assert engines.split(*items)["tokens"] == engines.whole(*items)["tokens"]


def test_answers_differ_between_pictures(engines: Engines) -> None:
    assert len({tuple(engines.split(picture(seed))["tokens"]) for seed in (21, 22, 23)}) > 1


def test_the_same_picture_twice(engines: Engines) -> None:
    item = picture(31)
    assert engines.split(item)["tokens"] == engines.split(item)["tokens"] == engines.whole(item)["tokens"]


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
def test_a_request_with_wrong_coordinates_fails_alone(engines: Engines, changes: dict[str, object], why: str) -> None:
    item = picture(41 + len(str(changes)))
    failed = engines.answer(broken(engines.encode(item), **changes), item)
    assert failed["reason"] == "error"
    assert re.search(f"cannot obtain its embedding: .*{why}", engines.consumer.log.read_text())
    assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]


def test_a_transfer_survives_cut_connections(engines: Engines) -> None:
    item = picture(9, 896, 896)
    params = engines.encode(item)
    endpoint = next(iter(params.values()))["embferry"]["endpoint"]
    with ChaosProxy(int(endpoint.rpartition(":")[2]), cut_after=2000, times=2) as proxy:
        answer = engines.answer(broken(params, endpoint=f"tcp://127.0.0.1:{proxy.port}"), item)
        assert proxy.cuts == 2
    assert answer["tokens"] == engines.whole(item)["tokens"]


def test_a_request_without_coordinates_or_image_fails_alone(engines: Engines) -> None:
    item = picture(51)
    unknown = {key: {"metadata": entry["metadata"]} for key, entry in engines.encode(item).items()}
    failed = engines.answer(unknown, item)
    assert failed["reason"] == "error"
    assert "neither coordinates nor the image" in engines.consumer.log.read_text()
    assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]


def test_a_killed_producer_can_be_replaced(engines: Engines) -> None:
    """Must run last in this file: it replaces the producer."""
    item = picture(61)
    params = engines.encode(item)
    old = engines.producer
    old.kill()
    failed = engines.answer(params, item)
    engines.producer = Engine(engines.model, old.log.with_name("another.log"), old.transfer)
    old.close()
    assert failed["reason"] == "error"
    engines.producer.started()
    assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]
