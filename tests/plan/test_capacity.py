"""The most requests a second that a deployment carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan.capacity import capacity
from embferry.plan.curve import Curve
from embferry.plan.deployment import Deployment
from embferry.plan.simulation import play
from embferry.plan.speeds import Speeds
from embferry.plan.workload import Asked

from .examples import SPEEDS, asked

SECONDS = st.floats(1e-5, 1e-2)
SPEEDS_DRAWN = st.builds(
    lambda encode, prefill, step, prepare, request, handover: Speeds(
        encode=Curve(each=encode),
        prefill=Curve(each=prefill),
        step=Curve(base=step, each=step / 10),
        prepare=Curve(each=prepare),
        request=request,
        handover=Curve(each=handover),
    ),
    *[SECONDS] * 6,
)
COUNT = st.integers(1, 8)
Law = Callable[[Sequence[Asked], Deployment, Speeds], float]


def test_the_slowest_stage_limits() -> None:
    one = asked(0.0)
    assert capacity(one, Deployment(0, 1), SPEEDS) == pytest.approx(1 / 0.12)
    assert capacity(one, Deployment(1, 1), SPEEDS) == pytest.approx(1 / 0.1), "the encoder"
    assert capacity(one, Deployment(8, 1), SPEEDS) == pytest.approx(1 / 0.02), "the language model"
    assert capacity(one, Deployment(1, 8), SPEEDS) == pytest.approx(1 / 0.1)


def test_a_step_is_shared_by_all_that_run() -> None:
    speeds = msgspec.structs.replace(SPEEDS, step=Curve(base=0.064, each=0.001), batch_requests=64)
    assert capacity(asked(0.0, output_tokens=11), Deployment(8, 1), speeds) == pytest.approx(1 / (0.02 + 10 * 0.002))


def test_shared_cores_limit_all_stages_together() -> None:
    shared = msgspec.structs.replace(SPEEDS, cores=1.0, load=0.5, split_load=2.0, split_request=0.01)
    assert capacity(asked(0.0), Deployment(0, 8), shared) == pytest.approx(1 / 0.06)
    assert capacity(asked(0.0), Deployment(8, 8), shared) == pytest.approx(1 / 0.26)


def adding_an_instance_never_costs_capacity(speeds: Speeds, encoders: int, languages: int, law: Law = capacity) -> None:
    one = asked(0.0, output_tokens=20)
    now = law(one, Deployment(encoders, languages), speeds)
    assert law(one, Deployment(encoders + 1, languages), speeds) >= now
    assert law(one, Deployment(encoders, languages + 1), speeds) >= now


@given(SPEEDS_DRAWN, COUNT, COUNT)
def test_more_instances_never_reduce_capacity(speeds: Speeds, encoders: int, languages: int) -> None:
    adding_an_instance_never_costs_capacity(speeds, encoders, languages)


def test_a_stage_whose_work_is_not_shared_is_noticed() -> None:
    """A mutant: each further encoder is asked for all pictures, so it adds work instead of taking some."""

    def mutant(one: Sequence[Asked], deployment: Deployment, speeds: Speeds) -> float:
        return capacity(one, Deployment(1, deployment.languages), speeds) / deployment.encoders

    with pytest.raises(AssertionError):
        adding_an_instance_never_costs_capacity(SPEEDS, 1, 1, law=mutant)


@given(SPEEDS_DRAWN, st.integers(0, 4), st.integers(1, 4))
def test_no_play_does_more_than_the_capacity(speeds: Speeds, encoders: int, languages: int) -> None:
    many = asked(*[0.0] * 60, output_tokens=5)
    deployment = Deployment(encoders, languages)
    assert play(many, deployment, speeds).throughput <= capacity(many, deployment, speeds) * 1.05


@given(SPEEDS_DRAWN, st.integers(1, 4), st.integers(1, 4))
def test_double_the_instances_carry_double(speeds: Speeds, encoders: int, languages: int) -> None:
    one = asked(0.0, output_tokens=5)
    double = capacity(one, Deployment(2 * encoders, 2 * languages), speeds)
    assert double == pytest.approx(2 * capacity(one, Deployment(encoders, languages), speeds))
