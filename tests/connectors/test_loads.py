"""Loads are repeated until every rank has marked them, and done once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from embferry.connectors.vllm.loads import Loads
from embferry.connectors.vllm.shared import SharedRows, attach


@pytest.fixture
def shared() -> Iterator[SharedRows]:
    made = SharedRows.make(3, 5, ranks=2)
    yield made
    made.close()


def numbers(loads: Loads, *freed: str) -> list[tuple[str, int, bool]]:
    return [(load.mm_hash, load.number, load.wanted) for load in loads.step(freed)]


def test_each_rank_marks_for_itself(shared: SharedRows) -> None:
    loads = Loads()
    loads.ask("a", shared, "float32", 1)
    ((_, number, _),) = numbers(loads)
    for rank in range(2):
        assert numbers(loads) == [("a", number, True)]
        assert shared.is_lent
        attach(shared.place).marks[rank] = number
    assert not shared.is_lent
    assert numbers(loads) == []


def test_the_next_load_of_the_same_is_another(shared: SharedRows) -> None:
    loads = Loads()
    loads.ask("a", shared, "float32", 1)
    ((_, first, _),) = numbers(loads)
    attach(shared.place).marks[:] = first
    loads.ask("a", shared, "float32", 1)
    ((_, second, _),) = numbers(loads)
    assert second > first
    assert shared.is_lent


def test_what_vllm_has_given_up_is_only_marked(shared: SharedRows) -> None:
    """In its cache it would stay for ever; and a rank may be about to map it."""
    loads = Loads()
    loads.ask("a", shared, "float32", 1)
    ((_, number, _),) = numbers(loads)
    assert numbers(loads, "a", "b") == [("a", number, False)]
    assert shared.is_lent


def test_the_memory_is_the_same_in_another_process_table() -> None:
    made = SharedRows.make(3, 5, ranks=2)
    made.rows[:] = np.arange(15, dtype=np.uint8).reshape(3, 5)
    taken = SharedRows.take(made.place)
    made.close()
    assert not made.is_open
    rows, marks = attach(taken.place)
    assert rows.tolist() == np.arange(15).reshape(3, 5).tolist()
    assert marks.tolist() == [0, 0]
    taken.close()
    with pytest.raises(OSError, match="No such file"):
        attach(taken.place)
    assert rows[2, 4] == 14  # who has mapped it keeps it
