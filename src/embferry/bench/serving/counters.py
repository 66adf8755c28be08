"""What servers count, read from their Prometheus metrics before and after a run."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families


class Counter(msgspec.Struct, frozen=True):
    """One figure of a report."""

    name: str
    metrics: tuple[str, ...]
    """What is added up. Metrics of any server, with all of their labels; each is there, or the figure is not."""
    unit: str = ""


COUNTERS = (
    Counter("transfers", ("embferry_ec_transfers_total",)),
    Counter("resumes", ("embferry_ec_resumed_transfers_total",)),
    Counter("replacements", ("embferry_ec_replacements_total",)),
    Counter("bytes on the wire", ("embferry_ec_wire_bytes_total",), "B"),
    Counter("bytes sent twice", ("embferry_ec_bytes_sent_twice_total",), "B"),
    Counter("encodes", ("embferry_ec_items_encoded_total",)),
    Counter("encodes saved", ("embferry_ec_encodes_saved_total", "embferry_router_encodes_skipped_total")),
    Counter("found at the consumer", ("embferry_ec_cache_hits_total",)),
    Counter("failed embeddings", ("embferry_ec_failures_total",)),
    Counter("encode retries", ("embferry_router_encode_retries_total",)),
    Counter("second attempts", ("embferry_router_second_attempts_total",)),
    Counter("time in encoders", ("embferry_router_encode_seconds_sum",), "s"),
    Counter("time until embeddings were here", ("embferry_ec_seconds_sum",), "s"),
)
Totals = dict[str, float]


def parse(text: str) -> Totals:
    """The sum of each metric over all of its labels: 0 for one that is declared and has none yet.

    :raises ValueError: it is not Prometheus' text format."""
    totals: Totals = {}
    for family in text_string_to_metric_families(text):
        if family.type == "counter":
            totals.setdefault(f"{family.name}_total", 0.0)
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def read(urls: Sequence[str], timeout_s: float = 5.0) -> list[Totals | None]:
    """Of each endpoint; None: it does not answer, or not with metrics."""
    with httpx.Client(timeout=timeout_s, trust_env=False, follow_redirects=True) as client:
        return [_read(client, url) for url in urls]


def _read(client: httpx.Client, url: str) -> Totals | None:
    try:
        answer = client.get(url)
        return parse(answer.text) if answer.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, ValueError):
        return None


def between(before: Sequence[Totals | None], after: Sequence[Totals | None]) -> dict[str, float | None]:
    """What each counter of the table rose by, over all endpoints. One that began anew in between counts from 0; one
    that has gone counts for nothing. None: no endpoint has it, or a part of it."""
    rose: dict[str, float | None] = {}
    for counter in COUNTERS:
        parts = [_rises(metric, before, after) for metric in counter.metrics]
        rose[counter.name] = sum(sum(part) for part in parts) if all(parts) else None
    return rose


def _rises(metric: str, before: Sequence[Totals | None], after: Sequence[Totals | None]) -> list[float]:
    return [
        _rise((old or {}).get(metric, 0.0), new[metric])
        for old, new in zip(before, after, strict=True)
        if new is not None and metric in new
    ]


def _rise(old: float, new: float) -> float:
    return new - old if new >= old else new
