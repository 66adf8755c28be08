"""Prometheus metrics of the router. Each application has its own registry, so that one process can run two."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class RouterMetrics:
    """Metrics of the router. Labels have few values: only known paths and stable codes."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "embferry_http_requests", "HTTP requests answered", ["path", "status"], registry=registry
        )
        self.in_flight = Gauge("embferry_chat_in_flight", "Chat requests being answered", registry=registry)
        self.seconds = Histogram(
            "embferry_chat_seconds", "From request to end of answer", buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "embferry_chat_first_token_seconds",
            "From request to first token (TTFT)",
            buckets=_SECONDS,
            registry=registry,
        )
        self.errors = Counter("embferry_chat_errors", "Chat requests that failed", ["code"], registry=registry)
        self.aborted = Counter("embferry_chat_aborted", "Chat requests whose client disconnected", registry=registry)
        self.prompt_tokens = Counter("embferry_prompt_tokens", "Tokens of prompts answered", registry=registry)
        self.completion_tokens = Counter("embferry_completion_tokens", "Tokens of answers", registry=registry)
        self.media = Counter("embferry_media_items", "Pictures and videos accepted", ["kind"], registry=registry)
        self.transfers = Counter(
            "embferry_transfers", "Transfers of embeddings behind finished answers", ["phase"], registry=registry
        )
        self.transfer_tokens = Counter(
            "embferry_transfer_tokens", "Tokens of embeddings transferred", registry=registry
        )
        self.transfer_bytes = Counter("embferry_transfer_bytes", "Bytes of embeddings transferred", registry=registry)
        self.workers = Gauge("embferry_workers", "Workers with a live lease", ["role"], registry=registry)
        self.worker_failures = Counter(
            "embferry_worker_failures", "Calls to workers that failed below HTTP", ["role"], registry=registry
        )

    def exposition(self) -> bytes:
        """Returns all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
