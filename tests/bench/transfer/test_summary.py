"""Figures computed from samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.bench.transfer.payloads import TOKEN_BYTES
from embferry.bench.transfer.results import jain, summarize
from tests.bench.transfer.examples import measured, point, sample

Times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40)


@given(Times)
def test_fairness_is_between_one_of_n_and_1(shares: list[float]) -> None:
    assert 1 / len(shares) * (1 - 1e-9) <= jain(shares) <= 1 + 1e-9


def test_fairness_of_equals_is_1_and_of_one_that_has_all_1_of_n() -> None:
    assert jain([3.0] * 7) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_a_summary_has_medians() -> None:
    measurement = measured("socket", 0.4, 0.1, 0.2)
    summary = summarize(measurement)
    assert summary is not None
    assert summary.p50 == 0.2
    assert summary.goodput == measurement.payload.size / 0.2
    assert (summary.low, summary.high) == pytest.approx(
        (measurement.payload.size / 0.3, measurement.payload.size / 0.15)
    )
    assert summary.receiver_cpu == pytest.approx(0.02 / measurement.payload.size * 1e9)


def test_there_is_no_summary_without_samples() -> None:
    assert summarize(measured("socket")) is None


def test_the_goodput_of_concurrent_transfers_counts_all_of_them() -> None:
    summary = summarize(point("concurrency", "shm", 2, sample(2.0), rooms=[256, 32]))
    assert summary is not None
    assert summary.goodput == (256 + 32) * TOKEN_BYTES / 2.0


def test_the_fairness_of_concurrent_transfers_is_that_of_their_goodputs() -> None:
    one = sample(1.0, waits=[1.0, 2.0])
    together, alone = (
        summarize(point("concurrency", "shm", 2, one, rooms=[256, 256])),
        summarize(measured("socket", 0.1)),
    )
    assert together is not None
    assert alone is not None
    assert together.fairness == pytest.approx(jain([1.0, 0.5]))
    assert alone.fairness is None
