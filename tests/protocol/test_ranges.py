"""Range sets compared with a set of integers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.protocol.ranges import RangeSet

SPAN = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: (min(pair), max(pair)))
STEPS = st.lists(st.tuples(st.booleans(), SPAN), max_size=12)


def build(steps: list[tuple[bool, tuple[int, int]]]) -> tuple[RangeSet, set[int]]:
    """Adds and removes ranges on both. Returns both."""
    ranges, model = RangeSet(), set()
    for add, (start, stop) in steps:
        tokens = set(range(start, stop))
        if add:
            assert ranges.add(start, stop) == len(tokens - model)
            model |= tokens
        else:
            ranges.discard(start, stop)
            model -= tokens
    return ranges, model


@given(STEPS)
def test_a_range_set_holds_the_same_numbers_as_a_set(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    ranges, model = build(steps)
    pieces = list(ranges)
    assert {token for start, stop in pieces for token in range(start, stop)} == model
    assert all(start < stop for start, stop in pieces)
    assert all(stop < start for (_, stop), (start, _) in pairwise(pieces))  # merged, ascending
    assert ranges.size == len(model)
    assert ranges.prefix == next(token for token in range(len(model) + 1) if token not in model)
    assert bool(ranges) == bool(model)


@given(STEPS, SPAN)
def test_a_range_set_covers_and_overlaps_as_a_set_does(
    steps: list[tuple[bool, tuple[int, int]]], span: tuple[int, int]
) -> None:
    ranges, model = build(steps)
    tokens = set(range(*span))
    assert ranges.covers(*span) == (tokens <= model)
    assert ranges.overlaps(*span) == bool(tokens & model)


def test_range_sets_with_the_same_numbers_are_equal() -> None:
    assert RangeSet((0, 2), (2, 4)) == RangeSet((0, 4))
    assert RangeSet((0, 4)) != RangeSet((0, 3))
    assert RangeSet() != {0}
    assert repr(RangeSet((0, 2), (5, 6))) == "RangeSet([0, 2), [5, 6))"


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2)])
def test_an_invalid_range_is_rejected(start: int, stop: int) -> None:
    ranges = RangeSet((0, 4))
    with pytest.raises(ValueError, match="not a range"):
        ranges.add(start, stop)
    with pytest.raises(ValueError, match="not a range"):
        ranges.discard(start, stop)
    assert ranges == RangeSet((0, 4))
