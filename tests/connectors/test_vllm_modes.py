"""Engines in the modes that people choose: each has, divided, the tokens that it has undivided."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .engines import picture
from .split import TEXT, Engines, running

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]

MODES: dict[str, dict[str, Any]] = {
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    },
    "asynchronous scheduling": {"async_scheduling": True},
    "synchronous scheduling": {"async_scheduling": False},
    "no processor cache": {"mm_processor_cache_gb": 0},
}


@pytest.fixture(scope="module", params=MODES)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    from embferry.models.tiny_qwen import make

    with running(tmp_path_factory.mktemp("modes"), make, ["tcp"], **MODES[request.param]) as made:
        yield made


def test_tokens_are_those_of_the_undivided_engine(engines: Engines) -> None:
    large, several = [picture(1, 896, 896)], [picture(seed) for seed in (2, 3, 4)]
    for items in ([picture(5)], large, several, [picture(5), *several]):
        assert engines.split(*items)["tokens"] == engines.whole(*items)["tokens"]
    engines.wait_until_settled()


def test_requests_at_the_same_time(engines: Engines) -> None:
    items = [picture(seed, 448, 448) for seed in range(11, 15)]
    params = [engines.encode(item) for item in items]
    asked = [(engines.message(given, item), given) for given, item in zip(params, items, strict=True)]
    answers = engines.consumer.ask_all(asked, max_tokens=64)
    for item, answer in zip(items, answers, strict=True):
        assert answer["tokens"] == engines.undivided.ask(item, TEXT, max_tokens=64)["tokens"]
