"""A producer and a real Mooncake store: a restart costs no encode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from embferry.cache.mooncake import MooncakeSettings, MooncakeStore
from tests.cache.mooncake_master import HOST, running_master

from .cache_encoder import Encoder, item
from .pair import rows_like

pytestmark = [pytest.mark.integration, pytest.mark.engines]


@pytest.fixture(scope="module")
def master() -> Iterator[str]:
    """The address of a master. Another process of the store has the memory."""
    with running_master() as address, closing(joined(address, segment=64 << 20)):
        yield address


def joined(master: str, segment: int = 0) -> MooncakeStore:
    return MooncakeStore(MooncakeSettings(master, HOST, segment_bytes=segment, buffer_bytes=16 << 20))


def test_a_restart_costs_no_encode(master: str) -> None:
    with closing(Encoder(joined(master))) as first:
        assert np.array_equal(first.ask(item("a"), seed=7), rows_like(7))
    assert first.count("shared_cache_written_bytes") > 0
    with closing(Encoder(joined(master))) as second:
        assert np.array_equal(second.ask(item("a"), seed=8), rows_like(7))
        assert (second.encodes, second.count("shared_cache_hits")) == (0, 1)
        assert np.array_equal(second.ask(item("a", content=1)._replace(mm_hash="b"), seed=9), rows_like(9))
    with closing(Encoder(joined(master), identity=b"another model")) as other:
        assert np.array_equal(other.ask(item("a"), seed=8), rows_like(8))
