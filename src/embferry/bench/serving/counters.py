"""Counters of the servers, read from their Prometheus metrics before and after a run."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.parser import text_string_to_metric_families

from . import documents

COUNTERS = {
    "transfers": ("embferry_connector_transfers_total",),
    "resumes": ("embferry_connector_resumed_transfers_total",),
    "failovers": ("embferry_connector_failovers_total",),
    "bytes on the wire": ("embferry_connector_wire_bytes_total",),
    "bytes sent twice": ("embferry_connector_repeated_bytes_total",),
    "encodes": ("embferry_connector_items_encoded_total",),
    "encodes saved": ("embferry_connector_encodes_saved_total", "embferry_router_encodes_skipped_total"),
    "found at the consumer": ("embferry_connector_cache_hits_total",),
    "failed embeddings": ("embferry_connector_failures_total",),
    "encode retries": ("embferry_router_encode_retries_total",),
    "second attempts": ("embferry_router_chat_second_attempts_total",),
    "time in encoders": ("embferry_router_encode_call_seconds_sum",),
    "time until embeddings arrived": ("embferry_connector_load_seconds_sum",),
}
"""Figures of a report, and the metrics that are added up, over all servers and labels; in bytes or seconds if the name
says so. If one is missing, the figure is missing."""
Totals = dict[str, float]


def parse(text: str) -> Totals:
    """Returns the sum of each metric over all of its labels; 0 for a counter that is declared without a value.

    Raises:
        ValueError: the text is not in Prometheus' format.
    """
    totals: Totals = {}
    for family in text_string_to_metric_families(text):
        if family.type == "counter":
            totals.setdefault(f"{family.name}_total", 0.0)
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def read(urls: Sequence[str], timeout_s: float = 5.0) -> list[Totals | None]:
    """Returns the metrics of each URL; None if it does not answer with metrics."""
    found: list[Totals | None] = []
    for url in urls:
        try:
            found.append(parse(documents.read(url, timeout_s).decode()))
        except (OSError, ValueError):
            found.append(None)
    return found


def between(before: Sequence[Totals | None], after: Sequence[Totals | None]) -> dict[str, float | None]:
    """Returns how much each counter rose, over all endpoints; None if no endpoint reports it.

    A counter that was reset in between counts from 0. An endpoint that has gone counts for nothing.
    """
    rose: dict[str, float | None] = {}
    for name, metrics in COUNTERS.items():
        parts = [_rises(metric, before, after) for metric in metrics]
        rose[name] = sum(sum(part) for part in parts) if all(parts) else None
    return rose


def _rises(metric: str, before: Sequence[Totals | None], after: Sequence[Totals | None]) -> list[float]:
    rises = []
    for earlier, now in zip(before, after, strict=True):
        if now is not None and metric in now:
            old, new = (earlier or {}).get(metric, 0.0), now[metric]
            rises.append(new - old if new >= old else new)
    return rises


def text(name: str, value: float) -> str:
    """Returns a figure of :data:`COUNTERS` for a report."""
    if name.startswith("time"):
        return f"{value:.2f} s"
    return f"{value / 1e6:.2f} MB" if name.startswith("bytes") and value else f"{value:,.0f}"
