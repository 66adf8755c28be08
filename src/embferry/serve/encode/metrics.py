"""Prometheus metrics of an encode worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from embferry.engine.cache import EmbeddingCache
from embferry.serve.worker.metrics import SECONDS, Readings


class EncodeMetrics:
    """The metrics of one worker.

    Args:
        states: returns the number of rooms in each state; called at each scrape.
    """

    def __init__(self, cache: EmbeddingCache, states: Callable[[], Mapping[str, float]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.finished = Counter("embferry_rooms", "Rooms that have ended", ["outcome"], registry=registry)
        self.items = Counter("embferry_items_encoded", "Pictures and videos encoded", ["kind"], registry=registry)
        self.encode_seconds = Histogram(
            "embferry_encode_seconds", "Time of the vision encoder for one item", buckets=SECONDS, registry=registry
        )
        self.prepare_seconds = Histogram(
            "embferry_prepare_seconds", "Time to decode a request's media", buckets=SECONDS, registry=registry
        )
        self.tokens = Counter("embferry_transfer_tokens", "Tokens of delivered embeddings", registry=registry)
        self.bytes = Counter("embferry_transfer_bytes", "Bytes sent of delivered embeddings", registry=registry)
        held = Gauge("embferry_cache_bytes", "Bytes of embeddings in the cache", registry=registry)
        held.set_function(lambda: cache.held_bytes)
        counters = cache.counters
        registry.register(Readings("embferry_rooms_by_state", "Open rooms by state", "state", states))
        registry.register(
            Readings(
                *("embferry_cache_lookups", "Cache lookups by outcome", "outcome"),
                lambda: {"hit": counters.hits, "miss": counters.misses, "eviction": counters.evictions},
                counter=True,
            )
        )
