"""Counters of the servers, read from their Prometheus metrics before and after a run."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families


class Counter(msgspec.Struct, frozen=True):
    """One figure of a report."""

    name: str
    metrics: tuple[str, ...]
    """Metrics that are added up, over all servers and labels. If one is missing, the figure is missing."""
    unit: str = ""


COUNTERS = (
    Counter("transfers", ("embferry_ec_transfers_total",)),
    Counter("resumes", ("embferry_ec_resumed_transfers_total",)),
    Counter("failovers", ("embferry_ec_failovers_total",)),
    Counter("bytes on the wire", ("embferry_ec_wire_bytes_total",), "B"),
    Counter("bytes sent twice", ("embferry_ec_bytes_sent_twice_total",), "B"),
    Counter("encodes", ("embferry_ec_items_encoded_total",)),
    Counter("encodes saved", ("embferry_ec_encodes_saved_total", "embferry_router_encodes_skipped_total")),
    Counter("found at the consumer", ("embferry_ec_cache_hits_total",)),
    Counter("failed embeddings", ("embferry_ec_failures_total",)),
    Counter("encode retries", ("embferry_router_encode_retries_total",)),
    Counter("second attempts", ("embferry_router_second_attempts_total",)),
    Counter("time in encoders", ("embferry_router_encode_seconds_sum",), "s"),
    Counter("time until embeddings arrived", ("embferry_ec_seconds_sum",), "s"),
)
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
    with httpx.Client(timeout=timeout_s, trust_env=False, follow_redirects=True) as client:
        return [_read(client, url) for url in urls]


def _read(client: httpx.Client, url: str) -> Totals | None:
    try:
        answer = client.get(url)
        return parse(answer.text) if answer.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, ValueError):
        return None


def between(before: Sequence[Totals | None], after: Sequence[Totals | None]) -> dict[str, float | None]:
    """Returns how much each counter rose, over all endpoints; None if no endpoint reports it.

    A counter that was reset in between counts from 0. An endpoint that has gone counts for nothing.
    """
    rose: dict[str, float | None] = {}
    for counter in COUNTERS:
        parts = [_rises(metric, before, after) for metric in counter.metrics]
        rose[counter.name] = sum(sum(part) for part in parts) if all(parts) else None
    return rose


def _rises(metric: str, before: Sequence[Totals | None], after: Sequence[Totals | None]) -> list[float]:
    rises = []
    for earlier, now in zip(before, after, strict=True):
        if now is not None and metric in now:
            old, new = (earlier or {}).get(metric, 0.0), now[metric]
            rises.append(new - old if new >= old else new)
    return rises
