"""The link of a language instance, with times that can be computed by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan.clock import Clock
from embferry.plan.link import Link


def ends(*transfers: tuple[float, float]) -> list[float]:
    """Returns the ends of transfers that begin at a time and would take so many seconds alone."""
    clock, found = Clock(), [0.0] * len(transfers)
    link = Link(clock)
    for number, (at, seconds) in enumerate(transfers):

        def ended(number: int = number) -> None:
            found[number] = clock.now

        clock.at(at, lambda seconds=seconds, ended=ended: link.add(seconds, ended))  # type: ignore[misc]
    clock.run()
    return found


@pytest.mark.parametrize(
    ("transfers", "expected"),
    [
        (((0.0, 2.0),), [2.0]),
        (((0.0, 1.0), (0.0, 1.0)), [2.0, 2.0]),
        (((0.0, 3.0), (0.0, 1.0)), [4.0, 2.0]),  # both at half the rate until 2, then the first alone
        (((0.0, 2.0), (1.0, 2.0)), [3.0, 4.0]),  # 1 s alone, 2 s both, 1 s alone
        (((0.0, 1.0), (5.0, 1.0)), [1.0, 6.0]),  # the link was idle between them
        (((0.0, 0.5), (0.0, 1.0), (0.0, 1.5)), [1.5, 2.5, 3.0]),
    ],
)
def test_transfers_share_the_link(transfers: tuple[tuple[float, float], ...], expected: list[float]) -> None:
    assert ends(*transfers) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(1e-6, 3)), min_size=1, max_size=12))
def test_no_transfer_is_faster_than_alone_and_the_link_does_no_more_than_it_can(
    transfers: list[tuple[float, float]],
) -> None:
    found = ends(*transfers)
    begun = min(at for at, _ in transfers)
    assert all(end >= at + seconds - 1e-6 for end, (at, seconds) in zip(found, transfers, strict=True))
    assert max(found) >= begun + sum(seconds for _, seconds in transfers) - 1e-6
    latest = max(at for at, _ in transfers)
    assert max(found) <= latest + sum(seconds for _, seconds in transfers) + 1e-6, "it is idle only without transfers"
