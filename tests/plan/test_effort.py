"""Plans have a bounded amount of work, counted in requests, pictures and plays."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan import effort as efforts
from embferry.plan.advice import advise
from embferry.plan.deployment import Deployment, arrangements
from embferry.plan.effort import MOST_WORK, effort, work
from embferry.plan.errors import RateNotCarried, WorkloadInvalid
from embferry.plan.simulation import DRAWS, Simulation
from embferry.plan.workload import Asked, Workload

from .examples import SPEEDS, asked


def all_work(one: efforts.Effort, requests: list[Asked], deployments: list[Deployment]) -> int:
    plays = sum(one.draws if deployment.encoders > 1 else 1 for deployment in deployments)
    return plays * sum(work(request, SPEEDS) for request in requests[: one.requests])


@given(st.integers(2, 80), st.integers(1, 300), st.integers(1, 300), st.integers(2, 12), st.integers(1, 10**6))
def test_all_plays_together_are_bounded(requests: int, pictures: int, output: int, devices: int, most: int) -> None:
    many = asked(*[0.0] * requests, pictures=(10,) * pictures, output_tokens=output)
    deployments = arrangements(devices)
    found = effort(many, deployments, SPEEDS, most)
    assert 1 <= found.draws <= DRAWS
    assert 2 <= found.requests <= requests
    assert all_work(found, many, deployments) <= most or found.requests == 2
    if found.requests < requests:
        assert found.draws == 1 or devices == 2, "there are fewer draws first, where anything is drawn"
        assert all_work(efforts.Effort(found.requests + 1, 1), many, deployments) > most


def test_a_request_that_alone_would_take_minutes_is_refused() -> None:
    with pytest.raises(WorkloadInvalid, match=r"a prompt of 1,000,000,000,100 tokens .* of batch_tokens"):
        advise(asked(0.0, 1.0, pictures=(10**12,)), 1e-9, SPEEDS, 1, devices=2)


def test_the_usual_plan_is_played_in_full() -> None:
    found = effort(asked(*[0.0] * 500, output_tokens=64), arrangements(6), SPEEDS)
    assert found == (500, DRAWS)
    assert found.told(500) == ""


def test_what_is_left_out_is_told() -> None:
    assert efforts.Effort(20, 1).told(500) == (
        "played, to end within seconds: the first 20 of 500 requests, 1 of 15 draws of the encoders of the pictures"
    )


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Returns a list to which every request that begins in any play is added."""
    found: list[Asked] = []
    original = Simulation._begin_at

    def begin(self: Simulation, one: Asked, *rest: object) -> None:
        found.append(one)
        original(self, one, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Simulation, "_begin_at", begin)
    return found


@pytest.mark.parametrize("cores", [None, 64.0])
def test_many_pictures_are_planned_with_as_little_work_as_few(
    begun: list[Asked], monkeypatch: pytest.MonkeyPatch, cores: float | None
) -> None:
    monkeypatch.setattr("embferry.plan.effort.effort.__defaults__", (MOST_WORK // 50,))
    monkeypatch.setattr("embferry.plan.advice.AT_ONCE_WORK", 10_000)
    speeds = msgspec.structs.replace(SPEEDS, cores=cores)
    album = Workload(pictures=(1,), images=400, rate=0.5, output_tokens=8)
    advice = advise(album.asked(), 0.5, speeds, 4096, devices=5)
    assert sum(work(one, speeds) for one in begun) <= MOST_WORK // 50 + 10_000 * len(advice.rows)
    assert "of 500 requests" in advice.played


def test_nothing_is_played_that_does_not_carry_the_rate(begun: list[Asked]) -> None:
    album = Workload(pictures=(100,), images=1000, rate=1.0)
    with pytest.raises(RateNotCarried, match="64 devices do not carry it"):
        advise(album.asked(), 1.0, SPEEDS, 4096)
    with pytest.raises(RateNotCarried, match="no arrangement of 3 devices"):
        advise(album.asked(), 1.0, SPEEDS, 4096, devices=3)
    assert begun == []
    # One encoder carries 10 pictures of 100 tokens a second, and two carry 20.
    advice = advise(asked(*[0.1 * n for n in range(20)]), 15.0, SPEEDS, 4096, devices=3)
    assert {one.deployment: one.outcome is None for one in advice.rows} == {
        Deployment(0, 3): False, Deployment(1, 2): True, Deployment(2, 1): False,
    }  # fmt: skip
    assert len(begun) == 20 * (1 + DRAWS)
