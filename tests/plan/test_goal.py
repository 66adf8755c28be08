"""The smallest fleet that meets a goal."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan import text
from embferry.plan.advice import FULL, advise
from embferry.plan.deployment import Deployment
from embferry.plan.errors import GoalNotMet, RateNotCarried, WorkloadInvalid
from embferry.plan.goal import advise_for, smallest
from embferry.plan.model import Model
from embferry.plan.speeds import Speeds
from embferry.plan.workload import Workload

from .examples import SPEEDS

BUSY = Workload(pictures=(100, 100), rate=6.0, burstiness_cv=2.0, output_tokens=8, requests=100)
ASKED = BUSY.asked()
SHARED = msgspec.structs.replace(SPEEDS, cores=2.0)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=70), st.integers(0, 10))
def test_the_fewest_are_found_with_few_tries(drops: list[int], goal: int) -> None:
    """More devices are never slower."""
    times = sorted(drops, reverse=True)
    tried = list[int]()

    def time(count: int) -> float:
        tried.append(count)
        return times[count - 1]

    expected = next((count for count, one in enumerate(times, 1) if one <= goal), None)
    assert smallest(time, goal, 1, len(times)) == expected
    assert len(tried) <= 14


@pytest.mark.parametrize("goal", [0.3, 0.26, 0.245])
def test_the_goal_is_met_and_one_device_less_does_not_meet_it(goal: float) -> None:
    found = advise_for(goal, ASKED, BUSY.rate, SPEEDS, 4096)
    taken = found.best
    assert taken.ttft <= goal
    assert taken.used <= FULL
    fewer = taken.deployment.instances - 1
    assert fewer >= 2
    for row in advise(ASKED, BUSY.rate, SPEEDS, 4096, devices=fewer).rows:
        assert row.ttft > goal or row.used > FULL, row.deployment.name
    report = text.report(Model("m", 4096, None), found, SPEEDS, text.Pictures(2, ((None, 100),)))
    assert report.tail[0].startswith(f"take: {taken.deployment.name}, the fewest that meet --ttft-goal {goal:g}: ")
    assert text.as_object(Model("m", 4096, None), found, SPEEDS, text.Pictures(2, ((None, 100),)))["ttft_goal"] == goal


@pytest.mark.parametrize("speeds", [SPEEDS, SHARED], ids=["own devices", "shared cores"])
def test_one_instance_is_taken_where_it_is_enough(speeds: Speeds) -> None:
    calm = Workload(pictures=(100,), rate=0.1, output_tokens=8, requests=50)
    assert advise_for(10.0, calm.asked(), 0.1, speeds, 4096).best.deployment == Deployment(0, 1)


@pytest.mark.parametrize("speeds", [SPEEDS, SHARED], ids=["own devices", "shared cores"])
def test_a_goal_below_what_one_request_takes_cannot_be_met(speeds: Speeds) -> None:
    """Encoding two pictures takes 0.1 s at the least, however many encoders there are."""
    asked = Workload(pictures=(100, 100), rate=1.0, output_tokens=8, requests=50).asked()
    with pytest.raises(GoalNotMet, match=r"--ttft-goal 0\.09: it cannot be met with up to .* Faster stages are needed"):
        advise_for(0.09, asked, 1.0, speeds, 4096)


def test_the_devices_given_are_the_most() -> None:
    needed = advise_for(0.26, ASKED, BUSY.rate, SPEEDS, 4096).best.deployment.instances
    assert advise_for(0.26, ASKED, BUSY.rate, SPEEDS, 4096, devices=needed).best.deployment.instances == needed
    with pytest.raises(GoalNotMet, match=f"up to {needed - 1} devices: "):
        advise_for(0.26, ASKED, BUSY.rate, SPEEDS, 4096, devices=needed - 1)


def test_a_rate_that_no_fleet_carries_is_told_first() -> None:
    with pytest.raises(RateNotCarried, match="By the demand law"):
        advise_for(10.0, ASKED, 1e5, SPEEDS, 4096)


@pytest.mark.parametrize("goal", [0.0, -1.0, float("nan"), float("inf")])
def test_a_goal_is_a_time(goal: float) -> None:
    with pytest.raises(WorkloadInvalid, match="--ttft-goal"):
        advise_for(goal, ASKED, BUSY.rate, SPEEDS, 4096)
