"""The requests of a plan arrive as those of the benchmark do."""

from __future__ import annotations

import pytest

from embferry.bench.serving.workload import Plan, requests
from embferry.plan.errors import WorkloadInvalid
from embferry.plan.workload import Workload


@pytest.mark.parametrize("cv", [0.0, 1.0, 4.9])
def test_the_times_are_those_of_the_benchmark(cv: float) -> None:
    asked = Workload(pictures=(64, 32), rate=2.0, burstiness_cv=cv, requests=40, seed=7).asked()
    sent = requests(Plan(requests=40, rate=2.0, burstiness_cv=cv, seed=7))
    assert [one.at for one in asked] == [one.at for one in sent]
    assert {(one.pictures, one.text_tokens, one.output_tokens) for one in asked} == {((64, 32), 100, 64)}
    assert (asked[0].visual_tokens, asked[0].prompt_tokens) == (96, 196)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (None, [(1, 2, 3), (1, 2, 3), (1, 2, 3)]),
        (1, [(1,), (2,), (3,)]),
        (2, [(1, 2), (3, 1), (2, 3)]),
        (4, [(1, 2, 3, 1), (2, 3, 1, 2), (3, 1, 2, 3)]),
    ],
)
def test_sizes_are_taken_in_turn_over_all_requests(images: int | None, expected: list[tuple[int, ...]]) -> None:
    asked = Workload(pictures=(1, 2, 3), images=images, rate=1.0, requests=3).asked()
    assert [one.pictures for one in asked] == expected


def test_a_workload_that_takes_minutes_to_play_is_refused() -> None:
    with pytest.raises(WorkloadInvalid, match="fewer requests"):
        Workload(pictures=(1,), rate=1.0, requests=100_000, output_tokens=1000).check()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"requests": 1_000_001, "output_tokens": 1}, "--images: at most 1,000,000"),
        ({"requests": 30_000, "pictures": (1,) * 1000}, "--images: at most 1,000,000"),
        ({"requests": 1001, "images": 1000}, "--images: at most 1,000,000"),
        ({"rate": 1e-300}, "--rate: at least 1e-06"),
        ({"burstiness_cv": 1e9}, "--burstiness-cv: 0, or from 0.001 to 1000"),
        ({"burstiness_cv": 1e300}, "--burstiness-cv"),
        ({"burstiness_cv": 1e-300}, "--burstiness-cv"),
    ],
)
def test_a_workload_that_cannot_be_played_is_refused(change: dict[str, object], words: str) -> None:
    """Too much work, or times that a clock of seconds cannot tell apart."""
    with pytest.raises(WorkloadInvalid, match=words):
        Workload(**({"pictures": (1,), "rate": 1.0} | change)).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("cv", [0.0, 0.001, 1000.0])
def test_the_most_and_the_least_even_arrivals_have_times(cv: float, seed: int) -> None:
    asked = Workload(pictures=(1,), rate=1e-6, burstiness_cv=cv, requests=2, seed=seed).asked()
    assert all(0 <= one.at <= 2e6 for one in asked)
