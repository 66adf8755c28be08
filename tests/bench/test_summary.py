"""Statistics of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.bench.results import Sample
from embferry.bench.summary import behind, fairness, jain, quantile, summarize
from tests.bench import made

Times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40)


@given(Times, st.floats(0, 1))
def test_a_quantile_is_numpys(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_a_quantile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantile"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="no quantile"):
        quantile([1.0], 1.5)


@given(Times)
def test_fairness_is_between_one_of_n_and_1(shares: list[float]) -> None:
    assert 1 / len(shares) * (1 - 1e-9) <= jain(shares) <= 1 + 1e-9


def test_fairness_of_equals_and_of_one_who_has_all() -> None:
    assert jain([3.0] * 7) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="nobody"):
        jain([0.0])


def test_a_summary_is_of_medians() -> None:
    measurement = made.measured("socket", 0.4, 0.1, 0.2)
    summary = summarize(measurement)
    assert summary is not None
    assert (summary.p50, summary.least, summary.most, summary.rounds) == (0.2, 0.1, 0.4, 3)
    assert summary.goodput == measurement.payload.size / 0.2
    assert summary.receiver_cpu == pytest.approx(0.02 / measurement.payload.size * 1e9)
    assert summary.wire == pytest.approx(1.0)


def test_a_summary_without_samples_is_none() -> None:
    assert summarize(made.measured("socket")) is None


def test_a_way_that_cannot_be_counted_has_no_wire() -> None:
    summary = summarize(made.measured("socket", 0.1, wire=None))
    assert summary is not None
    assert summary.wire is None


def test_the_goodput_of_a_crowd_counts_all_of_it() -> None:
    crowd = made.point("crowd", "shm", 4, made.sample(2.0), count=4)
    summary = summarize(crowd)
    assert summary is not None
    assert summary.goodput == 4 * crowd.payload.size / 2.0


def test_the_fairness_of_a_crowd_is_that_of_its_goodputs() -> None:
    sample = made.sample(1.0, began=0, ready=[10**9, 2 * 10**9])
    value = fairness(made.point("crowd", "shm", 2, sample, count=2))
    assert value == pytest.approx(jain([1.0, 0.5]))
    assert fairness(made.measured("socket", 0.1)) is None


def test_only_small_ones_that_began_while_the_large_one_ran_are_behind_it() -> None:
    details = {
        "small_began": [0, 100, 200, 900],
        "small_ready": [10, 150, 260, 950],
        "unloaded": 1,
        "large_began": 90,
        "large_ready": 500,
    }
    times = behind(made.point("behind", "shm", 0, Sample(1.0, 0, 0, None, 0, details)))
    assert times is not None
    assert times.alone == pytest.approx((10e-9,))
    assert times.behind == pytest.approx((50e-9, 60e-9))


def test_without_one_behind_there_is_nothing_to_say() -> None:
    details = {"small_began": [0], "small_ready": [1], "unloaded": 1, "large_began": 2, "large_ready": 3}
    assert behind(made.point("behind", "shm", 0, Sample(1.0, 0, 0, None, 0, details))) is None
