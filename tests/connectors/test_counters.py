"""The connector's metrics: what is counted, what Prometheus reads, and what vLLM's statistics get."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest

from embferry import TransportError
from embferry.connectors.shared.counters import BUCKETS, Counters, MetricsServer

from .pair import GUARD_S


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def server(counters: Counters) -> Iterator[MetricsServer]:
    made = MetricsServer(counters, "127.0.0.1", 0)
    yield made
    made.close()


@pytest.mark.integration
def test_prometheus_reads_what_was_counted(counters: Counters, server: MetricsServer) -> None:
    counters.add("tokens", 300)
    counters.add("failures", 2, "peer_gone")
    counters.add("failures", 1, "integrity_error")
    for part in (4000, 96):
        counters.add_gauge("offered_bytes", lambda part=part: part)
    for seconds in (0.0005, 0.002, 100.0):
        counters.observe_seconds(seconds)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=GUARD_S) as response:
        lines = response.read().decode().splitlines()
    for line in (
        "embferry_connector_tokens_total 300.0",
        "embferry_connector_requests_failed_total 0.0",
        'embferry_connector_failures_total{code="peer_gone"} 2.0',
        'embferry_connector_failures_total{code="integrity_error"} 1.0',
        "embferry_connector_offered_bytes 4096.0",
        'embferry_connector_load_seconds_bucket{le="0.001"} 1.0',
        'embferry_connector_load_seconds_bucket{le="0.003"} 2.0',
        f'embferry_connector_load_seconds_bucket{{le="{BUCKETS[-1]}"}} 2.0',
        'embferry_connector_load_seconds_bucket{le="+Inf"} 3.0',
        "embferry_connector_load_seconds_count 3.0",
        "embferry_connector_load_seconds_sum 100.0025",
    ):
        assert line in lines
    assert not [line for line in lines if line.startswith("embferry_connector_kept_bytes")]


@pytest.mark.integration
def test_a_port_in_use_is_an_error_that_names_the_setting(counters: Counters, server: MetricsServer) -> None:
    with pytest.raises(TransportError, match="metrics_port"):
        MetricsServer(counters, "127.0.0.1", server.port)


def test_an_unknown_name_or_a_missing_label_is_refused(counters: Counters) -> None:
    with pytest.raises(KeyError):
        counters.add("pigeons")
    with pytest.raises(AssertionError):
        counters.add("failures")


def test_changes_are_taken_once(counters: Counters) -> None:
    assert counters.take_changes() == {}
    counters.add("tokens", 3)
    counters.add("failures", 1, "peer_gone")
    counters.observe_seconds(0.5)
    counts = [("tokens", "", 3), ("failures", "peer_gone", 1)]
    assert counters.take_changes() == {"counts": counts, "seconds": [0.5]}
    assert counters.take_changes() == {}
    counters.add("tokens", 4)
    assert counters.take_changes() == {"counts": [("tokens", "", 4)], "seconds": []}
