"""Speeds that are computed from times: those of a play give the speeds that it was played with."""

from __future__ import annotations

from statistics import mean

import msgspec
import pytest

from embferry.plan.curve import Curve
from embferry.plan.deployment import Deployment
from embferry.plan.errors import MeasuringFailed
from embferry.plan.probes import Burst, Picture, Step, Text, Times, merged, noise, sizes, speeds
from embferry.plan.simulation import play
from embferry.plan.speeds import NOISY, Speeds
from embferry.plan.workload import Asked

TRUE = Speeds(
    encode=Curve(0.005, 1e-4, 1e-7),
    prefill=Curve(0.0, 5e-5, 1e-8),
    step=Curve(0.003, 1e-4),
    request=0.009,
    split_request=0.004,
    handover=Curve(0.02, 3e-5),
    cores=2.0,
    load=1.2,
    split_load=1.4,
)
SPLIT = Deployment(2, 1)


def lone(tokens: int, output: int, deployment: Deployment, *pictures: int) -> tuple[float, float]:
    """Returns the times to the first token and to the last of a request that is alone."""
    outcome = play([Asked(0.0, pictures, tokens, output)], deployment, TRUE)
    return outcome.ttft(), outcome.latency()


def played(deployment: Deployment, *, tells_engine: bool = False) -> Times:
    """Returns the times of the probes, as a play has them."""
    texts = []
    for tokens in (50, 300, 1000):
        ttft = lone(tokens, 1, deployment)[0]
        texts.append(Text(tokens, ttft, ttft - TRUE.request if tells_engine else None))
    pictures = []
    for visual in (64, 256, 576, 1024):
        ttft = lone(50, 1, deployment, visual)[0]
        pictures.append(Picture(visual, visual + 50, ttft, ttft - TRUE.request if tells_engine else None))
    steps = [Step(n, TRUE.step.at(n)) for n in (1, 8)]
    asked = tuple([Asked(0.0, (576,), 50, 16)] * 8)
    outcome = play(asked, deployment, TRUE)
    ttft = mean(one.first - one.began for one in outcome.requests)
    latency = mean(one.ended - one.began for one in outcome.requests)
    return Times(deployment, tuple(texts), tuple(pictures), tuple(steps), (Burst(asked, ttft, latency),))


@pytest.mark.parametrize("tells_engine", [False, True])
def test_what_was_played_is_found_again(tells_engine: bool) -> None:
    whole, split = played(Deployment(0, 1), tells_engine=tells_engine), played(SPLIT)
    found = speeds(whole, split, cores=2.0, source="a test")
    for deployment in (Deployment(0, 1), SPLIT):
        for pictures in ((), (100,), (400,), (900,)):
            asked = [Asked(0.0, pictures, 200, 9)]
            expected, got = play(asked, deployment, TRUE), play(asked, deployment, found)
            # Not exact: where the picture and the prompt are prepared at once, they share the cores.
            assert got.ttft() == pytest.approx(expected.ttft(), rel=0.08)
            assert got.latency() == pytest.approx(expected.latency(), rel=0.08)
    assert found.load == pytest.approx(TRUE.load, rel=0.06)
    assert found.split_load == pytest.approx(TRUE.split_load, rel=0.06)
    assert (found.cores, found.source) == (2.0, "a test")
    if tells_engine:
        assert found.request == pytest.approx(TRUE.request, rel=0.05)


@pytest.mark.parametrize(
    ("times", "expected"),
    [([0.1], 0.0), ([0.1] * 5, 0.0), ([0.1, 0.1, 0.1, 0.1, 9.0], 0.0), ([0.08, 0.09, 0.1, 0.11, 0.12], 0.083)],
)
def test_noise_is_how_far_the_median_may_be_off(times: list[float], expected: float) -> None:
    assert noise(times) == pytest.approx(expected, rel=0.01)
    assert noise(times * 4) <= noise(times), "with more repeats it is known better"


def test_the_noisiest_time_of_both_deployments_is_told_with_the_speeds() -> None:
    whole, split = played(Deployment(0, 1)), played(SPLIT)
    assert speeds(whole, split, cores=2.0, source="").noisy == ""
    rough = msgspec.structs.replace(split.pictures[1], noise=0.31)
    noisy = msgspec.structs.replace(split, pictures=(split.pictures[0], rough))
    found = speeds(whole, noisy, cores=2.0, source="")
    assert found.noise == 0.31 > NOISY
    assert "known to 31% only, and a plan needs 10%" in found.noisy
    assert "--repeats" in found.noisy


def test_an_undivided_engine_alone_says_nothing_of_splitting() -> None:
    found = speeds(played(Deployment(0, 1)), None, cores=None, source="")
    assert (found.handover, found.split_request, found.load) == (Curve(), 0.0, 1.0)


def test_a_router_that_tells_of_transfers_is_enough() -> None:
    split = played(SPLIT)
    told = tuple(msgspec.structs.replace(one, transfer=0.02) for one in split.pictures)
    found = speeds(None, msgspec.structs.replace(split, pictures=told), cores=None, source="")
    assert found.handover.at(500) == pytest.approx(0.02)
    asked = [Asked(0.0, (400,), 50, 1)]
    assert play(asked, SPLIT, found).ttft() == pytest.approx(play(asked, SPLIT, TRUE).ttft(), rel=0.1)


def test_too_few_times_are_no_speeds() -> None:
    empty = Times(Deployment(0, 1), (), (), ())
    with pytest.raises(MeasuringFailed):
        speeds(empty, None, cores=None, source="")
    with pytest.raises(MeasuringFailed):
        speeds(None, None, cores=None, source="")


def test_pictures_are_no_larger_than_the_model_takes() -> None:
    assert sizes((64, 256, 1024), 300) == [64, 256, 300]
    assert sizes((64, 256, 1024), 16) == [16]


def test_measuring_twice_gives_the_same_speeds_with_twice_the_points() -> None:
    once = played(Deployment(0, 1))
    twice = merged([once, once])
    assert len(twice.pictures) == 2 * len(once.pictures)
    assert len(twice.bursts) == 2
    found, again = (speeds(one, None, cores=2.0, source="") for one in (once, twice))
    assert again.encode.at(400) == pytest.approx(found.encode.at(400))
    assert again.load == found.load
