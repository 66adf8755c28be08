"""Numbers of an encode worker, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from embferry.engine.cache import EmbeddingCache
from embferry.serve.worker.metrics import SECONDS, Readings


class EncodeMetrics:
    """``states``: rooms by what they wait for, asked for at each scrape."""

    def __init__(self, cache: EmbeddingCache, states: Callable[[], Mapping[str, float]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.finished = Counter("embferry_rooms", "Rooms that have ended", ["outcome"], registry=registry)
        self.items = Counter("embferry_items_encoded", "Pictures and videos encoded", ["kind"], registry=registry)
        self.encode_seconds = Histogram(
            "embferry_encode_seconds", "The vision encoder's time for one item", buckets=SECONDS, registry=registry
        )
        self.prepare_seconds = Histogram(
            "embferry_prepare_seconds", "Decoding and cutting a request's media", buckets=SECONDS, registry=registry
        )
        self.tokens = Counter("embferry_transfer_tokens", "Tokens of embeddings delivered", registry=registry)
        self.bytes = Counter("embferry_transfer_bytes", "Bytes of embeddings sent", registry=registry)
        held = Gauge("embferry_cache_bytes", "Bytes of embeddings kept", registry=registry)
        held.set_function(lambda: cache.held_bytes)
        counters = cache.counters
        registry.register(Readings("embferry_rooms_by_state", "Rooms by what they wait for", "state", states))
        registry.register(
            Readings(
                *("embferry_cache_lookups", "Lookups of embeddings by content", "outcome"),
                lambda: {"hit": counters.hits, "miss": counters.misses, "eviction": counters.evictions},
                counter=True,
            )
        )
