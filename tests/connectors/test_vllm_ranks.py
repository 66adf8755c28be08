"""Two tensor-parallel ranks in each engine: both map the memory of one transfer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .engines import picture
from .split import Engines, running

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    from embferry.models.tiny_qwen import make

    with running(tmp_path_factory.mktemp("ranks"), make, ["tcp"], tensor_parallel_size=2) as made:
        yield made


def test_tokens_are_those_of_the_undivided_engine(engines: Engines) -> None:
    large, several = [picture(1, 896, 896)], [picture(seed) for seed in (2, 3, 4)]
    for items in ([picture(5)], large, several):
        assert engines.split(*items)["tokens"] == engines.whole(*items)["tokens"]
    assert engines.consumer.refresh()["transfers"] == 5
