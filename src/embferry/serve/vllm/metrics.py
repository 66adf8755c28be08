"""Metrics of the router before vLLM, for Prometheus. All names begin with ``embferry_router_``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class VllmRouterMetrics:
    """Every label has few values: known paths, stable codes, two roles."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests answered", "path", "status")
        self.aborted = self._counter("aborted", "Chat requests whose client left")
        self.errors = self._counter("failures", "Chat requests that failed, by the code their client got", "code")
        self.items = self._counter("items", "Pictures and videos accepted", "kind")
        self.encodes = self._counter("encodes", "Items encoded")
        self.affinity_hits = self._counter(
            "affinity_hits", "Items that went to an instance that had encoded the same content before"
        )
        self.encodes_skipped = self._counter(
            "encodes_skipped",
            "Items that were not encoded because the language instance had them, or was about to",
        )
        self.encode_retries = self._counter("encode_retries", "Encodes tried again at another instance")
        self.second_attempts = self._counter(
            "second_attempts", "Requests encoded and asked once more after a failure behind the encode"
        )
        self.failovers = self._counter(
            "failovers", "Embeddings under way for which another encoder was asked", "outcome"
        )
        self.fallbacks = self._counter("fallbacks", "Requests sent undivided to a language instance")
        self.instance_failures = self._counter("instance_failures", "Calls of instances that failed", "role")
        self.instances = Gauge("embferry_router_instances", "Instances that answer", ["role"], registry=self._registry)
        self.in_flight = Gauge("embferry_router_in_flight", "Chat requests being answered", registry=self._registry)
        self.seconds = self._histogram("seconds", "From request to end of answer")
        self.first_token_seconds = self._histogram("first_token_seconds", "From request to first token (TTFT)")
        self.encode_seconds = self._histogram("encode_seconds", "One item at an encode instance")

    def exposition(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"embferry_router_{name}", help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"embferry_router_{name}", help, buckets=_SECONDS, registry=self._registry)
