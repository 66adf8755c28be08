"""Every transport of the library in vLLM's processes, through a pool smaller than an embedding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .engines import picture
from .split import POOL_TOKENS, Engines, running

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=["shm", "tcp", "http", "mooncake", "nixl"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engines(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    from embferry.models.tiny_qwen import make

    with running(tmp_path_factory.mktemp(transport), make, [transport]) as made:
        yield made


def test_tokens_are_those_of_the_undivided_engine(engines: Engines, transport: str) -> None:
    """Small and large pictures, one and several, and one that the consumer has already."""
    small, large, several = [picture(1)], [picture(2, 896, 896)], [picture(seed) for seed in (3, 4, 5)]
    for items in (small, large, several, small):
        assert engines.split(*items)["tokens"] == engines.whole(*items)["tokens"]
    status = engines.consumer.refresh()
    assert status["transfers"] == 5
    assert status["windows"][transport] >= (4 * 48 + 1024) // POOL_TOKENS
    assert list(status["windows"]) == [transport]
    engines.wait_until_settled()


def test_several_requests_at_the_same_time(engines: Engines, transport: str) -> None:
    """Four in each engine; in the consumer they wait for each other's blocks."""
    items = [picture(seed, 448, 448) for seed in range(11, 15)]
    params = [answer["params"] for answer in engines.producer.ask_all([([item], None) for item in items])]
    asked = [(engines.message(given, item), given) for given, item in zip(params, items, strict=True)]
    answers = engines.consumer.ask_all(asked)
    assert [answer["tokens"] for answer in answers] == [engines.whole(item)["tokens"] for item in items]
    engines.wait_until_settled()
