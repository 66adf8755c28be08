"""Figures computed from samples."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.bench.transfer.payloads import TOKEN_BYTES
from embferry.bench.transfer.results import jain
from tests.bench.transfer.examples import measured, point, sample

Times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40)


@given(Times)
def test_fairness_is_between_one_of_n_and_1(shares: list[float]) -> None:
    assert 1 / len(shares) * (1 - 1e-9) <= jain(shares) <= 1 + 1e-9


def test_fairness_of_equals_is_1_and_of_one_that_has_all_1_of_n() -> None:
    assert jain([3.0] * 7) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_figures_are_medians_and_quartiles() -> None:
    found = measured("socket", 0.4, 0.1, 0.2)
    assert found.seconds(0.5) == 0.2
    assert found.goodput == pytest.approx(tuple(found.payload.size / seconds for seconds in (0.2, 0.3, 0.15)))
    assert found.cpu(lambda sample: sample.receiver_cpu) == pytest.approx(0.02 / found.payload.size * 1e9)


def test_there_are_no_figures_without_samples() -> None:
    assert not measured("socket").measured


def test_the_goodput_of_concurrent_transfers_counts_all_of_them() -> None:
    assert point("concurrency", "shm", 2, sample(2.0), rooms=[256, 32]).goodput[0] == (256 + 32) * TOKEN_BYTES / 2.0


def test_a_round_of_many_transfers_counts_all_of_them() -> None:
    many = point("small", "shm", 1, sample(2.0, waits=[1.0, 3.0]), tokens=2, count=10)
    assert many.goodput[0] == 10 * 2 * TOKEN_BYTES / 2.0
    assert many.cpu_of_one(lambda sample: sample.receiver_cpu) == pytest.approx(0.002)
    assert (many.wait(0.0), many.wait(1.0)) == (1.0, 3.0)
    assert math.isnan(measured("socket", 0.1).wait(0.5))


def test_the_fairness_of_concurrent_transfers_is_that_of_their_goodputs() -> None:
    one = sample(1.0, waits=[1.0, 2.0])
    assert point("concurrency", "shm", 2, one, rooms=[256, 256]).fairness == pytest.approx(jain([1.0, 0.5]))
    assert measured("socket", 0.1).fairness is None
