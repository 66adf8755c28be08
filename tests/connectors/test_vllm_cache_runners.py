"""The cache that encoders share, as vLLM's V1 and V2 runners call our hooks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .pair import until
from .runners import TOKENS, WIDTH, Request, Side, feature, vllm

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(600)]


class Pixels(dict[str, Any]):
    """The data of an item."""

    def __init__(self, content: int) -> None:
        super().__init__(pixel_values=SimpleNamespace(data=torch.full((4,), float(content))))

    def get_data(self) -> Mapping[str, Any]:
        return {}


def output(seed: int) -> torch.Tensor:
    """Returns an embedding like the encoder's."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def asked(side: Side, name: str, content: int = 0, seed: int = 0) -> Any:
    """Runs a request, and returns what vLLM's encoder cache then has. It is encoded if it is not found."""
    item = feature(name)
    item.data = Pixels(content)
    request = Request(f"{name} {content}", item)
    until(lambda: side.scheduler.ensure_cache_available(request, 0))
    new = {} if side.scheduler.has_cache_item(name) else {name: output(seed)}
    side.scheduler.update_state_after_alloc(request, 0)
    side.run(side.plan(), new)
    request.status = vllm().status.FINISHED_LENGTH_CAPPED
    side.scheduler.request_finished(request)
    return side.caches[0][name]


def count(side: Side, name: str, label: str = "") -> int:
    found: int = side.scheduler._scheduler.counters.read().get((name, label), 0)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_restarted_producer_loads_what_was_encoded_before(runner: str, ranks: int, tmp_path: Path) -> None:
    cache = {"url": (tmp_path / "cache").as_uri(), "lookup_timeout": 60.0}
    first = Side(runner, "ec_producer", ranks, cache=cache)
    assert torch.equal(asked(first, "a", seed=1), output(1))
    first.close()
    again = Side(runner, "ec_producer", ranks, cache=cache)
    try:
        assert torch.equal(asked(again, "a", seed=2), output(1))
        assert (count(again, "items_encoded"), count(again, "shared_cache_hits")) == (0, 1)
        assert all(torch.equal(each["a"], output(1)) for each in again.caches[:ranks])
        assert torch.equal(asked(again, "b", seed=3), output(3))
        assert count(again, "items_encoded") == 1
    finally:
        again.close()


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_name_that_stands_for_another_picture_finds_nothing(runner: str, tmp_path: Path) -> None:
    cache = {"url": (tmp_path / "cache").as_uri(), "lookup_timeout": 60.0}
    for content in (1, 2):
        side = Side(runner, "ec_producer", cache=cache)
        assert torch.equal(asked(side, "a", content, seed=content), output(content))
        assert count(side, "shared_cache_misses", "absent") == 1
        side.close()
    assert len(list((tmp_path / "cache").iterdir())) == 2
