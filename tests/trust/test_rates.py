"""Averages of clients and of networks, on a clock of the test's own."""

from __future__ import annotations

import pytest

from embferry.trust import rates as module
from embferry.trust.policy import is_loopback
from embferry.trust.rates import Bucket, Excess, NetworkRates, Rates
from tests.clock import Clock


def test_a_bucket_may_be_overdrawn_and_is_paid_back() -> None:
    bucket = Bucket(10.0, 0.0)
    assert bucket.wait(1.0, 0.0) == 0
    bucket.take(70.0)  # 20 were there
    assert bucket.wait(1.0, 0.0) == pytest.approx(5.1)
    assert bucket.wait(1.0, 5.1) == pytest.approx(0.0)
    assert bucket.wait(21.0, 1000.0) == pytest.approx(0.1)  # no more is saved than for two seconds


def test_requests_and_bytes_are_averages_of_their_own() -> None:
    rates = Rates(2.0, 100.0, 0.0)
    assert [rates.enter(0.0) for _ in range(4)] == [None] * 4
    assert rates.enter(0.0) == Excess("2 requests a second", 1)
    rates = Rates(None, 100.0, 0.0)
    rates.count(500)  # 200 were there
    assert rates.enter(0.0) == Excess("100 bytes a second", 4)
    assert rates.enter(3.01) is None
    assert Rates(None, None, 0.0).enter(0.0) is None


def test_each_network_has_averages_of_its_own() -> None:
    clock = Clock()
    rates = NetworkRates(1.0, 10.0, clock=clock)
    assert [rates.enter("192.0.2.1", "192.0.2.1") for _ in range(2)] == [None] * 2
    assert rates.enter("192.0.2.1", "192.0.2.1") == Excess("1 requests a second", 1)
    assert rates.enter("192.0.2.2", "192.0.2.2") is None
    rates.count("192.0.2.2", 1000)
    assert rates.enter("192.0.2.2", "192.0.2.2") == Excess("10 bytes a second", 99)
    assert rates.refused == 2
    clock.now += 1
    assert rates.enter("192.0.2.1", "192.0.2.1") is None


def test_exempt_addresses_have_no_limits_and_take_no_memory() -> None:
    rates = NetworkRates(1.0, 1.0, is_loopback, Clock())
    for _ in range(100):
        assert rates.enter("127.0.0.1", "127.0.0.1") is None
        rates.count("127.0.0.1", 1 << 30)
    assert (len(rates), rates.refused) == (0, 0)


def test_the_networks_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NETWORKS", 10)
    rates = NetworkRates(0.5, 1.0, clock=Clock())
    assert rates.enter("10.0.0.1", "10.0.0.1") is None
    for n in range(100):
        rates.enter(f"10.0.1.{n}", f"10.0.1.{n}")
        assert rates.enter("10.0.0.1", "10.0.0.1") is not None  # asked lately, so it is not forgotten
    assert len(rates) == 10
