"""Predictions beside results of the benchmark."""

from __future__ import annotations

import msgspec
import pytest

from embferry.bench import machine
from embferry.bench.serving.engines import VLLM
from embferry.bench.serving.results import Run, Sample, ServingResults
from embferry.bench.serving.workload import Plan, requests
from embferry.plan.comparison import UNDIVIDED, Point, asked_in, by_workload, compared, deployment_of, table
from embferry.plan.deployment import Deployment
from embferry.plan.errors import ResultsInvalid
from embferry.plan.simulation import play

from .examples import SPEEDS

PLAN = Plan(requests=12, rate=1.0, max_images=3, seed=4)
WHOLE = Deployment(0, 1)


def run(factor: float = 1.0, **changes: object) -> Run:
    """Returns a run that took so many times as long as it would be predicted."""
    made, samples = requests(PLAN), []
    for one in made:
        n, tokens = len(one.pictures), one.image_tokens
        samples.append(Sample(one.number, one.at, n, tokens, 0, 200, "", 1.0, (), 2.0, 4, tokens + 30, (), "x"))
    found = Run("undivided", "an engine", "a workload", plan=PLAN, samples=samples)
    outcome = play(asked_in(found), WHOLE, SPEEDS)
    found.samples = [
        msgspec.structs.replace(sample, ttft=(one.first - one.began) * factor, latency=(one.ended - one.began) * factor)
        for sample, one in zip(samples, outcome.requests, strict=True)
    ]
    found.duration = outcome.duration * factor
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_the_requests_are_those_that_were_sent() -> None:
    asked = asked_in(run())
    assert [one.at for one in asked] == [one.at for one in requests(PLAN)]
    assert [one.visual_tokens for one in asked] == [one.image_tokens for one in requests(PLAN)]
    assert {(one.text_tokens, one.output_tokens) for one in asked} == {(30, 4)}


def test_a_run_that_went_as_predicted_has_no_error() -> None:
    point = compared([run()], WHOLE, SPEEDS)
    assert (point.ttft_error, point.rate_error, point.holds) == (pytest.approx(0), pytest.approx(0), True)
    assert point.title == "a workload"


@pytest.mark.parametrize(("factor", "holds"), [(1.15, True), (1.3, False), (0.8, False)])
def test_a_point_holds_within_a_fifth(factor: float, holds: bool) -> None:
    point = compared([run(factor)], WHOLE, SPEEDS)
    assert point.ttft_error == pytest.approx(1 / factor - 1)
    assert point.holds is holds
    assert table([point])[1][-1] == ("" if holds else "outside 20%")


def test_rounds_count_by_their_median() -> None:
    point = compared([run(1.0), run(1.1), run(9.0)], WHOLE, SPEEDS)
    assert point.ttft_error == pytest.approx(1 / 1.1 - 1)


def test_the_table_has_both_figures_and_the_error() -> None:
    point = Point("w", WHOLE, 0.11, 0.1, 1.9, 2.0)
    assert table([point])[1] == ("w", "undivided, 1 instance", "110", "100", "+10%", "1.90", "2.00", "-5%", "")


def test_the_undivided_engine_has_this_name() -> None:
    assert VLLM.undivided.name == UNDIVIDED


def test_rounds_of_a_workload_belong_together() -> None:
    other = run(scenario="another")
    none = run(samples=[])
    assert [len(found) for found in by_workload([run(), other, none, run()])] == [2, 1]


def test_a_comparison_says_which_instances_it_has_started() -> None:
    results = ServingResults.begin(machine.describe({}))
    given = Deployment(3, 2)
    assert deployment_of(run(), results, given) == given
    results.compared = True
    assert deployment_of(run(), results, given) == WHOLE
    assert deployment_of(run(name="ours-shm"), results, given) == Deployment(2, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": None}, "no workload"),
        ({"samples": []}, "no workload"),
        ({"samples": run().samples[1:]}, "interrupted"),
        ({"samples": [msgspec.structs.replace(one, error="HTTP 503") for one in run().samples]}, "12 requests failed"),
        ({"samples": [msgspec.structs.replace(one, wrong=True) for one in run().samples]}, "12 requests failed"),
        ({"samples": [msgspec.structs.replace(one, repeated=1) for one in run().samples]}, "knows no caches"),
        ({"samples": [msgspec.structs.replace(one, ttft=None) for one in run().samples]}, "no time to first token"),
        ({"samples": [msgspec.structs.replace(one, ttft=0.0) for one in run().samples]}, "no time to first token"),
        ({"samples": [msgspec.structs.replace(one, output_tokens=1 << 60) for one in run().samples]}, "more than"),
        ({"samples": [msgspec.structs.replace(one, prompt_tokens=1 << 60) for one in run().samples]}, "more than"),
        ({"concurrency": -1}, "-1 requests at once"),
        ({"plan": msgspec.structs.replace(PLAN, requests=10**12)}, "interrupted"),
        ({"plan": msgspec.structs.replace(PLAN, rate=0.0)}, "is damaged: rate"),
        ({"plan": msgspec.structs.replace(PLAN, rate=1e-308)}, "is damaged: rate"),
        ({"plan": msgspec.structs.replace(PLAN, burstiness_cv=1e300)}, "is damaged: coefficient"),
    ],
)
def test_runs_that_cannot_be_predicted_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ResultsInvalid, match=words):
        asked_in(run(**changes))


@pytest.mark.parametrize("duration", [0.0, -1.0, 1e300])
def test_a_run_that_took_no_time_is_refused(duration: float) -> None:
    with pytest.raises(ResultsInvalid, match="is damaged: it took"):
        compared([run(duration=duration)], WHOLE, SPEEDS)
