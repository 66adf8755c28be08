"""The work of a worker, from its page of metrics: the requests that run or wait there."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

Counted = Callable[[Sample], bool]

WORK_STATES = frozenset({"decoding", "encoding"})
"""States of rooms that keep an encode worker busy. In the others it waits for a language worker, or sends."""


def waits_for_encoder(sample: Sample) -> bool:
    """Returns whether a sample counts rooms that an encode worker is busy with, or that wait for it."""
    return sample.name == "embferry_encode_rooms" and sample.labels.get("state") in WORK_STATES


def waits_for_answer(sample: Sample) -> bool:
    """Returns whether a sample counts requests that a language worker answers, or that wait for it."""
    return sample.name == "embferry_language_requests"


def waits_in_vllm(sample: Sample) -> bool:
    """Returns whether a sample counts requests that run or wait in an instance of vLLM."""
    return sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting")


def total(page: str, counted: Counted) -> float:
    """Returns the sum of the samples that ``counted`` selects of a page in Prometheus' text format.

    Raises:
        ValueError: there is none, or the page is in another format.
    """
    families = text_string_to_metric_families(page)
    found = [sample.value for family in families for sample in family.samples if counted(sample)]
    if not found:
        raise ValueError("the page of metrics does not say how many requests there are")
    return sum(found)
