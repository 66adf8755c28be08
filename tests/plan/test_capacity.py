"""The most requests a second that a deployment carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan.capacity import LINK, Demands, capacity
from embferry.plan.curve import Curve
from embferry.plan.deployment import Deployment
from embferry.plan.simulation import play
from embferry.plan.speeds import Speeds
from embferry.plan.workload import Asked

from .examples import SPEEDS, asked

SECONDS = st.floats(1e-5, 1e-2)
SPEEDS_DRAWN = st.builds(
    lambda encode, prefill, step, prepare, request, handover, bandwidth: Speeds(
        encode=Curve(each=encode),
        prefill=Curve(each=prefill),
        step=Curve(base=step, each=step / 10),
        prepare=Curve(each=prepare),
        request=request,
        handover=Curve(each=handover),
        bandwidth=bandwidth,
    ),
    *[SECONDS] * 6,
    st.none() | st.floats(1e5, 1e9),
)
TOKEN_BYTES = 4096
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
    most = capacity(many, deployment, speeds, TOKEN_BYTES)
    assert play(many, deployment, speeds, TOKEN_BYTES).throughput <= most * 1.05


def test_the_link_of_each_language_instance_limits() -> None:
    speeds = msgspec.structs.replace(SPEEDS, bandwidth=2e6)
    one = asked(0.0)  # 100 tokens of 4,096 bytes: 0.2048 s of one link
    assert capacity(one, Deployment(8, 1), speeds, TOKEN_BYTES) == pytest.approx(1 / 0.2048)
    assert capacity(one, Deployment(8, 4), speeds, TOKEN_BYTES) == pytest.approx(4 / 0.2048)
    assert capacity(one, Deployment(1, 4), speeds, TOKEN_BYTES) == pytest.approx(1 / 0.1), "the encoder"
    assert capacity(one, Deployment(0, 1), speeds, TOKEN_BYTES) == pytest.approx(1 / 0.12), "nothing is transferred"
    stages = Demands.of(one, speeds, TOKEN_BYTES, is_split=True).stages(Deployment(8, 1))
    assert max(stages, key=lambda name: stages[name]) == LINK


def never_more_than_the_link(speeds: Speeds, pictures: int, deployment: Deployment, law: Law) -> None:
    assert speeds.bandwidth is not None
    most = speeds.bandwidth / (pictures * 100 * TOKEN_BYTES) * deployment.languages
    assert law(asked(0.0, pictures=(100,) * pictures), deployment, speeds) <= most * (1 + 1e-9)


@given(SPEEDS_DRAWN.filter(lambda one: one.bandwidth is not None), COUNT, COUNT, COUNT)
def test_no_deployment_carries_more_than_its_links(
    speeds: Speeds, pictures: int, encoders: int, languages: int
) -> None:
    def law(requests: Sequence[Asked], deployment: Deployment, speeds: Speeds) -> float:
        return capacity(requests, deployment, speeds, TOKEN_BYTES)

    never_more_than_the_link(speeds, pictures, Deployment(encoders, languages), law)


def test_a_link_that_limits_nothing_is_noticed() -> None:
    """A mutant: the law leaves the bytes out."""
    with pytest.raises(AssertionError):
        never_more_than_the_link(msgspec.structs.replace(SPEEDS, bandwidth=1e3), 1, Deployment(1, 1), capacity)


@given(SPEEDS_DRAWN, st.booleans(), st.floats(0.01, 1e4))
def test_the_smallest_deployment_carries_the_rate_and_no_smaller_one_does(
    speeds: Speeds, is_split: bool, rate: float
) -> None:
    demands = Demands.of(asked(0.0, output_tokens=5), speeds, TOKEN_BYTES, is_split=is_split)
    found = demands.fewest(rate)
    assert demands.capacity(found) >= rate * (1 - 1e-6)
    if found.languages > 1:
        assert demands.capacity(Deployment(found.encoders, found.languages - 1)) < rate * (1 + 1e-6)
    if found.encoders > 1:
        assert demands.capacity(Deployment(found.encoders - 1, found.languages)) < rate * (1 + 1e-6)


@given(SPEEDS_DRAWN, st.integers(1, 4), st.integers(1, 4))
def test_double_the_instances_carry_double(speeds: Speeds, encoders: int, languages: int) -> None:
    one = asked(0.0, output_tokens=5)
    double = capacity(one, Deployment(2 * encoders, 2 * languages), speeds)
    assert double == pytest.approx(2 * capacity(one, Deployment(encoders, languages), speeds))
