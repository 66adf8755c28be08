"""Memory shared with workers, and loads that are repeated until every rank has completed them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from embferry.connectors.shared.shape import Shape
from embferry.connectors.shared.shared_rows import SharedRows
from embferry.connectors.vllm.pending_loads import PendingLoads

SHAPE = Shape(tokens=3, width=5, dtype="uint8")


@pytest.fixture
def shared() -> Iterator[SharedRows]:
    made = SharedRows.make(SHAPE, ranks=2)
    yield made
    made.close()


def step(loads: PendingLoads, *freed: str) -> list[tuple[str, int, bool]]:
    return [(load.mm_hash, load.number, load.wanted) for load in loads.for_step(freed)]


def test_a_load_is_repeated_until_each_rank_has_completed_it(shared: SharedRows) -> None:
    loads = PendingLoads()
    loads.add("a", shared)
    ((_, number, _),) = step(loads)
    for rank in range(2):
        assert step(loads) == [("a", number, True)]
        assert shared.is_loading
        with closing(SharedRows.adopt(shared.duplicate(), SHAPE, ranks=2)) as mapped:
            mapped.completed[rank] = number
    assert not shared.is_loading
    assert step(loads) == []


def test_the_next_load_of_an_embedding_has_another_number(shared: SharedRows) -> None:
    loads = PendingLoads()
    loads.add("a", shared)
    ((_, first, _),) = step(loads)
    shared.completed[:] = first
    loads.add("a", shared)
    ((_, second, _),) = step(loads)
    assert second > first
    assert shared.is_loading


def test_an_evicted_embedding_is_not_copied_but_its_load_is_completed(shared: SharedRows) -> None:
    """In vLLM's cache it would stay for ever; and a rank may be about to map it."""
    loads = PendingLoads()
    loads.add("a", shared)
    ((_, number, _),) = step(loads)
    assert step(loads, "a", "b") == [("a", number, False)]
    assert shared.is_loading


def test_memory_lives_as_long_as_a_process_holds_or_maps_it() -> None:
    made = SharedRows.make(SHAPE, ranks=2)
    made.rows[:] = np.arange(15, dtype=np.uint8).reshape(3, 5)
    opened = SharedRows.adopt(made.duplicate(), SHAPE, ranks=2)
    made.close()
    assert not made.is_open
    assert opened.rows.tolist() == np.arange(15).reshape(3, 5).tolist()
    assert opened.completed.tolist() == [0, 0]
    opened.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        opened.duplicate()
    assert opened.rows[2, 4] == 14, "an existing mapping stays valid"
