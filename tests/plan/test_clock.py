"""Virtual time, and work that shares cores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan.clock import Clock
from embferry.plan.station import Station


def ends(clock: Clock, *seconds: float) -> list[float]:
    """Returns when pieces of work end that begin together."""
    found = [0.0] * len(seconds)
    for number, length in enumerate(seconds):
        clock.work(length, lambda number=number: found.__setitem__(number, clock.now))  # type: ignore[misc]
    clock.run()
    return found


def test_work_with_a_core_each_takes_its_time() -> None:
    assert ends(Clock(), 3.0, 1.0, 2.0) == [3.0, 1.0, 2.0]
    assert ends(Clock(cores=3), 3.0, 1.0, 2.0) == [3.0, 1.0, 2.0]


def test_work_on_one_core_takes_turns() -> None:
    # Two at half speed until the shorter has done its second; then the longer is alone.
    assert ends(Clock(cores=1), 3.0, 1.0) == pytest.approx([4.0, 2.0])


def test_a_busy_instance_may_fill_more_than_a_core() -> None:
    assert ends(Clock(cores=2, load=2.0), 1.0, 1.0) == pytest.approx([2.0, 2.0])
    assert ends(Clock(cores=2, load=2.0), 1.0) == pytest.approx([1.0])


def test_a_delay_needs_no_core() -> None:
    clock, times = Clock(cores=1), []
    clock.after(2.0, lambda: times.append(clock.now))
    assert ends(clock, 3.0) == [3.0]
    assert times == [2.0]


def test_work_that_begins_later_slows_what_is_under_way() -> None:
    clock, times = Clock(cores=1), []
    clock.work(2.0, lambda: times.append(clock.now))
    clock.at(1.0, lambda: clock.work(2.0, lambda: times.append(clock.now)))
    clock.run()
    assert times == pytest.approx([3.0, 4.0])


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.integers(1, 4))
def test_cores_are_full_while_there_is_enough_to_do(seconds: list[float], cores: int) -> None:
    last = max(ends(Clock(cores=cores), *seconds))
    assert last >= max(*seconds, sum(seconds) / cores) * (1 - 1e-9)
    assert last <= (sum(seconds) / cores + max(seconds)) * (1 + 1e-9)


def test_a_station_does_one_thing_after_the_other() -> None:
    clock, times = Clock(), []
    station = Station(clock)
    for _ in range(3):
        station.add(1.5, lambda: times.append(clock.now))
    assert station.waiting == 3
    clock.run()
    assert (times, station.busy, station.waiting) == ([1.5, 3.0, 4.5], 4.5, 0)
