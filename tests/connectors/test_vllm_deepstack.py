"""A model with deepstack, whose embeddings are several times as wide as a token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .engines import picture, video
from .split import Engines, running

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    from embferry.models.tiny_qwen3 import make

    limit = {"image": 4, "video": 1}
    with running(tmp_path_factory.mktemp("deepstack"), make, ["tcp"], limit_mm_per_prompt=limit) as made:
        yield made


def test_tokens_are_those_of_the_undivided_engine(engines: Engines) -> None:
    from embferry.models.tiny_qwen import HIDDEN
    from embferry.models.tiny_qwen3 import LEVELS

    large, several = [picture(1, 896, 896)], [picture(seed) for seed in (2, 3, 4)]
    for items in ([picture(5)], large, several):
        params = engines.encode(*items)
        assert {entry["embferry"]["width"] for entry in params.values()} == {HIDDEN * (1 + len(LEVELS))}
        assert engines.answer(params, *items)["tokens"] == engines.whole(*items)["tokens"]
    assert engines.consumer.refresh()["transfers"] == 5


def test_a_video_gets_the_tokens_of_the_undivided_engine(engines: Engines) -> None:
    item = video(1)
    assert engines.split(item)["tokens"] == engines.whole(item)["tokens"]
