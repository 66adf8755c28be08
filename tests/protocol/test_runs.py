"""Runs of blocks, compared with their definition: every block, one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embferry.protocol.runs import Run, Runs, distinct_runs

RUNS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=8).map(tuple)


def expanded(runs: tuple[Run, ...]) -> list[int]:
    return [block for first, count in runs for block in range(first, first + count)]


@given(RUNS, st.integers(0, 50), st.integers(0, 50))
def test_a_part_of_the_blocks_is_found(runs: tuple[Run, ...], start: int, stop: int) -> None:
    found = Runs(*zip(*runs, strict=True))
    assert found.between(start, stop) == tuple(expanded(runs)[start:stop])
    assert (len(found), found.blocks) == (len(runs), len(expanded(runs)))


@given(RUNS, st.integers(1, 25))
def test_blocks_that_repeat_or_do_not_exist_are_found(runs: tuple[Run, ...], num_blocks: int) -> None:
    blocks = expanded(runs)
    found = distinct_runs(runs, num_blocks)
    assert (found is not None) == (len(set(blocks)) == len(blocks) and max(blocks) < num_blocks)
    assert found is None or found.between(0, len(blocks)) == tuple(blocks)


def test_no_run_is_expanded() -> None:
    runs = Runs((1, 0), (1 << 32, 1))
    assert runs.between((1 << 32) - 1, (1 << 32) + 1) == (1 << 32, 0)
    assert Runs().between(0, 1) == ()
