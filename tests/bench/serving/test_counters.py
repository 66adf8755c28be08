"""Counters of servers, read before and after."""

from __future__ import annotations

import pytest

from embferry.bench.serving import counters

from . import stub_endpoint as stub

BEFORE = """\
# HELP embferry_connector_resumed_transfers_total Transfers that were resumed.
# TYPE embferry_connector_resumed_transfers_total counter
embferry_connector_resumed_transfers_total{transport="tcp"} 3.0
embferry_connector_resumed_transfers_total{transport="shm"} 1.0
# HELP embferry_connector_transfer_seconds Times.
# TYPE embferry_connector_transfer_seconds histogram
embferry_connector_transfer_seconds_bucket{le="+Inf"} 2.0
embferry_connector_transfer_seconds_count 2.0
embferry_connector_transfer_seconds_sum 0.5
"""
DECLARED = """\
# HELP embferry_connector_resumed_transfers_total Transfers that were resumed.
# TYPE embferry_connector_resumed_transfers_total counter
"""


def test_labels_are_added_up_and_a_declared_counter_is_0() -> None:
    totals = counters.parse(BEFORE)
    assert totals["embferry_connector_resumed_transfers_total"] == 4.0
    assert totals["embferry_connector_transfer_seconds_sum"] == 0.5
    assert counters.parse(DECLARED) == {"embferry_connector_resumed_transfers_total": 0.0}


@pytest.mark.parametrize(
    ("before", "after", "rose"),
    [
        (
            [{"embferry_connector_resumed_transfers_total": 4.0}],
            [{"embferry_connector_resumed_transfers_total": 9.0}],
            5.0,
        ),
        ([{}], [{"embferry_connector_resumed_transfers_total": 9.0}], 9.0),
        ([None], [{"embferry_connector_resumed_transfers_total": 9.0}], 9.0),
        (
            [{"embferry_connector_resumed_transfers_total": 9.0}],
            [{"embferry_connector_resumed_transfers_total": 2.0}],
            2.0,
        ),
        (
            [{"embferry_connector_resumed_transfers_total": 4.0}],
            [{"embferry_connector_resumed_transfers_total": 4.0}],
            0.0,
        ),
        ([{"embferry_connector_resumed_transfers_total": 4.0}], [None], None),
        ([{"other_total": 1.0}], [{"other_total": 2.0}], None),
        ([], [], None),
    ],
)
def test_a_counter_that_no_server_reports_is_none(
    before: list[counters.Totals | None], after: list[counters.Totals | None], rose: float | None
) -> None:
    assert counters.between(before, after)["resumes"] == rose


def test_endpoints_are_added_up() -> None:
    name = "embferry_connector_resumed_transfers_total"
    before, after = [{name: 1.0}, {name: 2.0}, {}], [{name: 2.0}, {name: 4.0}, {}]
    assert counters.between(before, after)["resumes"] == 3.0


@pytest.mark.integration
def test_an_endpoint_without_metrics_is_none() -> None:
    with stub.serving(stub.Request.hang, {"/metrics": BEFORE, "/page": "<html>"}) as url:
        found = counters.read([f"{url}/metrics", f"{url}/page", f"{url}/nothing"])
    assert found[0] is not None
    assert found[0]["embferry_connector_resumed_transfers_total"] == 4.0
    assert found[1:] == [None, None]
    assert counters.read([f"{url}/metrics"]) == [None]
