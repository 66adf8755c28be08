"""The connector's numbers, as Prometheus finds them."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator

import pytest

from embferry.connectors.vllm.exposition import Exposition
from embferry.connectors.vllm.tally import BUCKETS, COUNTERS, Tally
from embferry.protocol.errors import LocalProtocolError, TransportError


@pytest.fixture
def tally() -> Tally:
    return Tally()


@pytest.fixture
def exposition(tally: Tally) -> Iterator[Exposition]:
    made = Exposition(tally, "127.0.0.1", 0)
    yield made
    made.close()


def lines(exposition: Exposition) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{exposition.port}/metrics", timeout=5) as response:
        return [line for line in response.read().decode().splitlines() if not line.startswith("#")]


@pytest.mark.integration
def test_what_was_counted_is_shown(tally: Tally, exposition: Exposition) -> None:
    tally.add("tokens", 300)
    tally.add("failures", 2, "peer_gone")
    tally.add("failures", 1, "integrity_error")
    for part in (4000, 96):
        tally.gauge("offered_bytes", lambda part=part: part)
    for seconds in (0.0005, 0.002, 100.0):
        tally.took(seconds)
    shown = lines(exposition)
    for line in (
        "embferry_ec_tokens_total 300.0",
        "embferry_ec_requests_failed_total 0.0",
        'embferry_ec_failures_total{code="peer_gone"} 2.0',
        'embferry_ec_failures_total{code="integrity_error"} 1.0',
        "embferry_ec_offered_bytes 4096.0",
        'embferry_ec_seconds_bucket{le="0.001"} 1.0',
        'embferry_ec_seconds_bucket{le="0.003"} 2.0',
        f'embferry_ec_seconds_bucket{{le="{BUCKETS[-1]}"}} 2.0',
        'embferry_ec_seconds_bucket{le="+Inf"} 3.0',
        "embferry_ec_seconds_count 3.0",
        "embferry_ec_seconds_sum 100.0025",
    ):
        assert line in shown
    assert not [line for line in shown if line.startswith("embferry_ec_kept_bytes")]


@pytest.mark.integration
def test_a_port_that_is_taken(tally: Tally, exposition: Exposition) -> None:
    with pytest.raises(TransportError, match="metrics_port: cannot listen"):
        Exposition(tally, "127.0.0.1", exposition.port)


def test_without_prometheus_client(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(LocalProtocolError, match="metrics_port needs prometheus_client"):
        Exposition(tally, "127.0.0.1", 0)


def test_a_counter_that_nobody_knows(tally: Tally) -> None:
    with pytest.raises(KeyError):
        tally.add("pigeons")
    with pytest.raises(AssertionError):
        tally.add("failures")  # without its code
    assert all(not metric.label or metric.label in ("outcome", "code") for metric in COUNTERS.values())
