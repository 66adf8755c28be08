"""Metrics of the router before vLLM, for Prometheus."""

from __future__ import annotations

from embferry.observe.metrics import ChatMetrics


class VllmRouterMetrics(ChatMetrics):
    """The metrics of both routers, and the metrics of encodes, which this router asks for item by item."""

    def __init__(self) -> None:
        super().__init__()
        counter = self.counter
        self.encodes = counter("embferry_router_encodes", "Items encoded")
        again = "Items that went to an instance that had encoded the same content before"
        self.affinity_hits = counter("embferry_router_affinity_hits", again)
        skipped = "Items that were not encoded because the language instance had them, or was about to"
        self.encodes_skipped = counter("embferry_router_encodes_skipped", skipped)
        blamed = "Items refused because encoders failed on them: instances_lost, not_encodable"
        self.media_refused = counter("embferry_router_media_refused", blamed, ["reason"])
        for reason in ("instances_lost", "not_encodable"):  # from 0 on, so that they rise
            self.media_refused.labels(reason)
        self.encode_retries = counter("embferry_router_encode_retries", "Encodes tried again at another instance")
        under_way = "Embeddings under way for which another encoder was asked"
        self.failovers = counter("embferry_router_failovers", under_way, ["outcome"])
        early = "Requests to a language instance before their items were encoded: used, unexpected, failed"
        self.overlapped = counter("embferry_router_overlapped", early, ["outcome"])
        self.fallbacks = counter("embferry_router_fallbacks", "Requests sent undivided to a language instance")
        names = "Files that requests named without sending them: found, unknown"
        self.named_media = counter("embferry_router_named_media", names, ["outcome"])
        self.named_bytes = self.gauge(
            "embferry_router_named_media_bytes", "Bytes of files kept under the names of clients"
        )
        self.encode_seconds = self.histogram("embferry_router_encode_call_seconds", "One item at an encode instance")
        self.prefill_seconds = self.histogram(
            "embferry_router_prefill_call_seconds", "One prefill, where others decode"
        )
