"""An engine that is short of room, or has much to do, or whose client changes its mind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from embferry.testing.proxy import ChaosProxy

from .engines import picture, video
from .split import TEXT, Engines, broken, running

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(240)]

BLOCK = 128 * 2048
"""Bytes of the KV cache's block: 128 tokens."""
NARROW: dict[str, Any] = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 256,  # a large picture takes several steps
    "max_model_len": 1536,
    "kv_cache_memory_bytes": 13 * BLOCK,
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    from embferry.models.tiny_qwen import make

    options = {"limit_mm_per_prompt": {"image": 4, "video": 1}, "media_io_kwargs": {"video": {"fps": 2}}}
    with running(tmp_path_factory.mktemp("load"), make, ["tcp"], producer=NARROW, consumer=NARROW, **options) as made:
        yield made


def test_a_picture_larger_than_a_step(engines: Engines) -> None:
    for item in (picture(1, 896, 896), picture(2)):
        assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]


def test_a_prefix_that_is_cached(engines: Engines) -> None:
    """In both engines: the picture is not encoded again, and does not come again."""
    item = picture(3, 448, 448)
    whole = engines.whole(item)["tokens"]
    assert engines.split(item)["tokens"] == whole
    before = engines.consumer.status
    assert engines.split(item)["tokens"] == whole
    after = engines.consumer.status
    assert after["prefix_hits"] > before["prefix_hits"]
    assert after["transfers"] == before["transfers"]


def test_preemption(engines: Engines) -> None:
    """Four that grow until there is no room for all: who gives way comes back and needs its picture again."""
    items = [picture(seed, 448, 448) for seed in range(11, 15)]
    params = [engines.encode(item) for item in items]
    asked = [(engines.message(given, item), given) for given, item in zip(params, items, strict=True)]
    answers = engines.consumer.ask_all(asked, max_tokens=200)
    assert engines.consumer.status["preemptions"] > 0
    for item, answer in zip(items, answers, strict=True):
        assert answer["tokens"] == engines.undivided.ask(item, TEXT, max_tokens=200)["tokens"]
    assert engines.settled()


def test_a_request_that_is_aborted_in_the_middle(engines: Engines) -> None:
    """Nothing leaks, and the same picture can be had again."""
    item = picture(21, 896, 896)
    params = engines.encode(item)
    endpoint = next(iter(params.values()))["embferry"]["endpoint"]
    with ChaosProxy(int(endpoint.rpartition(":")[2])) as proxy:
        given = broken(params, endpoint=f"tcp://127.0.0.1:{proxy.port}")
        aborted = engines.consumer.ask_and_abort(*engines.message(given, item), params=given)
    assert [answer["reason"] for answer in aborted] in ([], ["abort"])
    assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]
    assert engines.settled()


def test_a_video(engines: Engines) -> None:
    """At two frames a second, as this model has them. vLLM 0.32.0 tells the consumer the grid and not the rate, so at
    another one the consumer has other positions than the undivided engine, whatever the connector."""
    item = video(1)
    assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]
