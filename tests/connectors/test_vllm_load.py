"""Engines with little memory, with many tokens at once, and with aborted requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from embferry.testing.proxy import ChaosProxy

from .engines import picture, video
from .split import TEXT, Engines, broken, running

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]

BLOCK = 128 * 2048
"""Bytes of one KV cache block of 128 tokens."""
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


def test_a_picture_may_take_several_steps(engines: Engines) -> None:
    for item in (picture(1, 896, 896), picture(2)):
        assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]


def test_a_picture_in_a_cached_prefix_is_not_transferred_again(engines: Engines) -> None:
    """The prefix is cached in both engines."""
    item = picture(3, 448, 448)
    whole = engines.whole(item)["tokens"]
    assert engines.split(item)["tokens"] == whole
    before = engines.consumer.status
    assert engines.split(item)["tokens"] == whole
    after = engines.consumer.status
    assert after["prefix_hits"] > before["prefix_hits"]
    assert after["transfers"] == before["transfers"]


def test_a_preempted_request_gets_its_picture_again(engines: Engines) -> None:
    """Four requests grow until the KV cache is full, and some are preempted."""
    items = [picture(seed, 448, 448) for seed in range(11, 15)]
    params = [engines.encode(item) for item in items]
    asked = [(engines.message(given, item), given) for given, item in zip(params, items, strict=True)]
    answers = engines.consumer.ask_all(asked, max_tokens=200)
    assert engines.consumer.status["preemptions"] > 0
    for item, answer in zip(items, answers, strict=True):
        assert answer["tokens"] == engines.undivided.ask(item, TEXT, max_tokens=200)["tokens"]
    engines.wait_until_settled()


def test_a_request_aborted_in_the_middle_leaks_nothing(engines: Engines) -> None:
    """The same picture can be requested again."""
    item = picture(21, 896, 896)
    params = engines.encode(item)
    endpoint = next(iter(params.values()))["embferry"]["endpoint"]
    with ChaosProxy(int(endpoint.rpartition(":")[2])) as proxy:
        given = broken(params, endpoint=f"tcp://127.0.0.1:{proxy.port}")
        aborted = engines.consumer.ask_and_abort(*engines.message(given, item), params=given)
    assert [answer["reason"] for answer in aborted] in ([], ["abort"])
    assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]
    engines.wait_until_settled()


def test_a_video_gets_the_tokens_of_the_undivided_engine(engines: Engines) -> None:
    """The video has two frames per second, the model's default.

    vLLM 0.32.0 tells the consumer the grid and not the frame rate. At another rate the consumer has other positions
    than the undivided engine, with any connector.
    """
    item = video(1)
    assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]
