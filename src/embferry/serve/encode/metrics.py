"""Prometheus metrics of an encode worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client.core import CounterMetricFamily

from embferry.engine.cache import EmbeddingCache
from embferry.serve.worker.metrics import WorkerMetrics


class EncodeMetrics(WorkerMetrics):
    """The metrics of one worker.

    Args:
        cache: the embeddings that it keeps.
        states: returns the number of rooms in each state; called at each scrape.
    """

    def __init__(self, cache: EmbeddingCache, states: Callable[[], Mapping[str, float]]) -> None:
        super().__init__()
        self.finished = self.counter("embferry_encode_rooms_ended", "Rooms that have ended", ["outcome"])
        self.items = self.counter("embferry_encode_items_encoded", "Pictures and videos encoded", ["kind"])
        self.encode_seconds = self.histogram(
            "embferry_encode_encoder_seconds", "Time of the vision encoder for one item"
        )
        self.prepare_seconds = self.histogram("embferry_encode_prepare_seconds", "Time to decode a picture or video")
        self.tokens = self.counter("embferry_encode_transfer_tokens", "Tokens of delivered embeddings")
        self.bytes = self.counter("embferry_encode_transfer_bytes", "Bytes sent of delivered embeddings")
        held = self.gauge("embferry_encode_cache_bytes", "Bytes of embeddings in the cache")
        held.set_function(lambda: cache.held_bytes)
        self.reading("embferry_encode_rooms", "Open rooms by state", "state", states)

        def lookups() -> dict[str, float]:
            counters = cache.counters
            return {"hit": counters.hits, "miss": counters.misses}

        outcomes = "Cache lookups by outcome"
        self.reading("embferry_encode_cache_lookups", outcomes, "outcome", lookups, CounterMetricFamily)
        evicted = "Embeddings that left the cache because others needed their room"
        name = "embferry_encode_cache_evictions"
        self.reading(name, evicted, "", lambda: {"": cache.counters.evictions}, CounterMetricFamily)
