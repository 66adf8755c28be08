"""Metrics of the router before vLLM, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from embferry.observe.metrics import ChatMetrics


class VllmRouterMetrics(ChatMetrics):
    """Every label has few values: known paths, stable codes, two roles."""

    def __init__(self) -> None:
        super().__init__()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return self.counter(f"embferry_router_{name}", help, labels)

        def histogram(name: str, help: str) -> Histogram:
            return self.histogram(f"embferry_router_{name}", help)

        self.requests = counter("requests", "HTTP requests answered", "path", "status")
        self.aborted = counter("aborted", "Chat requests whose client left")
        self.errors = counter("failures", "Chat requests that failed, by the code their client got", "code")
        self.items = counter("items", "Pictures and videos accepted", "kind")
        self.encodes = counter("encodes", "Items encoded")
        again = "Items that went to an instance that had encoded the same content before"
        self.affinity_hits = counter("affinity_hits", again)
        skipped = "Items that were not encoded because the language instance had them, or was about to"
        self.encodes_skipped = counter("encodes_skipped", skipped)
        self.encode_retries = counter("encode_retries", "Encodes tried again at another instance")
        second = "Requests encoded and asked once more after a failure behind the encode"
        self.second_attempts = counter("second_attempts", second)
        self.failovers = counter("failovers", "Embeddings under way for which another encoder was asked", "outcome")
        self.fallbacks = counter("fallbacks", "Requests sent undivided to a language instance")
        self.instance_failures = counter("instance_failures", "Calls of instances that failed", "role")
        damaged = "Messages between router and instances that arrived damaged"
        self.damaged = counter("damaged_messages", damaged, "role")
        self.instances = self.gauge("embferry_router_instances", "Instances that answer", ["role"])
        self.in_flight = self.gauge("embferry_router_in_flight", "Chat requests being answered")
        self.held_bytes = self.gauge("embferry_router_held_bytes", "Bytes of bodies and media held for chat requests")
        self.seconds = histogram("seconds", "From request to end of answer")
        self.first_token_seconds = histogram("first_token_seconds", "From request to first token (TTFT)")
        self.encode_seconds = histogram("encode_seconds", "One item at an encode instance")
