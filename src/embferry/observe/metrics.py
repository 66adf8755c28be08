"""Prometheus metrics. Each application has its own registry, so that one process can run two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from embferry.observe.logs import dropped_lines

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PUBLIC_LABELS = ("phase", "role", "outcome", "code", "kind", "reason")
"""Labels whose values are words of this project."""
HELD_BYTES = "embferry_process_held_bytes", "Bytes of bodies, media, prompts and embeddings held for requests"
"""Name and help text of a gauge that routers and workers have."""


@dataclass(eq=False)
class Reading(Collector):
    """A gauge or counter whose values are read at each scrape, on any thread.

    Attributes:
        label: the name of its label; empty if it has none.
        read: returns the metric's value for each value of the label, for "" if it has none.
    """

    name: str
    help: str
    label: str
    read: Callable[[], Mapping[str, float]]
    kind: type[CounterMetricFamily | GaugeMetricFamily] = GaugeMetricFamily

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        family = self.kind(self.name, self.help, labels=[self.label] if self.label else [])
        for value, number in self.read().items():
            family.add_metric([value] if self.label else [], number)
        yield family


class Metrics:
    """Base of the metrics of a process: docs/metrics.md has the rules for their names.

    Attributes:
        buckets: upper bounds of the buckets of every histogram of times, in seconds.
    """

    buckets: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counter = partial(Counter, registry=self.registry)
        self.gauge = partial(Gauge, registry=self.registry)
        self.histogram = partial(Histogram, buckets=self.buckets, registry=self.registry)
        ProcessCollector(registry=self.registry)
        about = "Log lines that were dropped because the log was not read"
        self.reading(
            "embferry_process_log_lines_dropped", about, "", lambda: {"": dropped_lines()}, CounterMetricFamily
        )

    def reading(
        self,
        name: str,
        about: str,
        label: str,
        read: Callable[[], Mapping[str, float]],
        kind: type[CounterMetricFamily | GaugeMetricFamily] = GaugeMetricFamily,
    ) -> None:
        """Adds a :class:`Reading`."""
        self.registry.register(Reading(name, about, label, read, kind))

    def totals(self) -> dict[str, float]:
        """Returns the counters and gauges of this project, and the number of observations of each histogram.

        They are those of :meth:`exposition`, except that only labels of ``PUBLIC_LABELS`` are told: the others are
        summed over.
        """
        found: dict[str, float] = {}
        for family in self.registry.collect():
            if not family.name.startswith("embferry_"):
                continue
            for sample in family.samples:
                if sample.name == family.name or sample.name.endswith(("_total", "_count")):
                    labels = [name for name in PUBLIC_LABELS if name in sample.labels]
                    told = ",".join(f'{name}="{sample.labels[name]}"' for name in labels)
                    name = f"{sample.name}{{{told}}}" if told else sample.name
                    found[name] = found.get(name, 0) + sample.value
        return found

    def exposition(self) -> bytes:
        """Returns all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class ChatMetrics(Metrics):
    """The metrics that both routers have. Labels have few values: only known paths, stable codes and two roles.

    A worker is one of this project, or an instance of vLLM.
    """

    def __init__(self) -> None:
        super().__init__()
        counter, gauge, histogram = self.counter, self.gauge, self.histogram
        about = "Requests under /v1/ by the name of their API key, accepted or refused by its limits"
        self.client_requests = counter("embferry_router_client_requests", about, ["key", "outcome"])
        about = "Bytes of request bodies by the name of the API key"
        self.client_bytes = counter("embferry_router_client_bytes", about, ["key"])
        about = "Requests being answered by the name of their API key"
        self.client_in_flight = gauge("embferry_router_client_in_flight", about, ["key"])
        self.requests = counter("embferry_router_http_requests", "HTTP requests answered", ["path", "status"])
        self.in_flight = gauge("embferry_router_chat_in_flight", "Chat requests being answered")
        self.seconds = histogram("embferry_router_chat_seconds", "From request to end of answer")
        self.first_token_seconds = histogram(
            "embferry_router_chat_first_token_seconds", "From request to first token (TTFT)"
        )
        self.errors = counter(
            "embferry_router_chat_errors", "Chat requests that failed, by the client's code", ["code"]
        )
        self.aborted = counter("embferry_router_chat_aborted", "Chat requests whose client disconnected")
        self.held_bytes = gauge(*HELD_BYTES)
        again = "Further attempts at chat requests, after a failure of a worker or a damaged message"
        self.second_attempts = counter("embferry_router_chat_second_attempts", again)
        damaged = "Messages between router and workers that arrived damaged"
        self.damaged = counter("embferry_router_damaged_messages", damaged, ["role"])
        self.media = counter("embferry_router_media_items", "Pictures, videos and sounds accepted", ["kind"])
        self.workers = gauge("embferry_router_workers", "Workers with a live lease, or instances that answer", ["role"])
        self.worker_failures = counter(
            "embferry_router_worker_failures", "Calls to workers that failed below HTTP", ["role"]
        )

    def set_workers(self, role: str, count: int) -> None:
        """Sets how many workers of a role there are, and makes counters by role begin at 0, so that they rise."""
        self.workers.labels(role).set(count)
        for counter in (self.damaged, self.worker_failures):
            counter.labels(role)


class RouterMetrics(ChatMetrics):
    """Metrics of the router before workers of this project: their answers tell more than those of vLLM."""

    def __init__(self) -> None:
        super().__init__()
        counter = self.counter
        self.prompt_tokens = counter("embferry_router_prompt_tokens", "Tokens of prompts answered")
        self.completion_tokens = counter("embferry_router_completion_tokens", "Tokens of answers")
        self.transfers = counter(
            "embferry_router_transfers", "Transfers of embeddings behind finished answers", ["phase"]
        )
        self.transfer_tokens = counter("embferry_router_transfer_tokens", "Tokens of embeddings transferred")
        self.transfer_bytes = counter("embferry_router_transfer_bytes", "Bytes of embeddings transferred")
        about = "From the first token of an embedding to its last, as the language worker saw them"
        self.transfer_seconds = self.histogram("embferry_router_chat_transfer_seconds", about)
