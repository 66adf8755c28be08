"""Metrics of one engine's connector, and the HTTP endpoint that shows them to Prometheus.

The values are kept here and not in metric objects of prometheus_client: when vLLM runs several API servers, that
library shares its values between processes, and each counter would appear a second time on vLLM's own ``/metrics``.
"""

from __future__ import annotations

import socket
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator
from http import HTTPStatus
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from embferry import TransportError
from embferry.discovery.http_server import BACKLOG, Answer, HttpServer, RequestError
from embferry.discovery.server_limits import ServerLimits


class Definition(NamedTuple):
    """Help text of a metric, and the names of its labels: one or none."""

    help: str
    labels: tuple[str, ...] = ()


LIMITS = ServerLimits(connections=64, connections_per_address=32)
"""Bounds on what scrapers, and strangers in their place, can hold in an engine."""
PREFIX = "embferry_connector_"
COUNTERS = {
    "transfers": Definition("Transfers of embeddings that have ended", ("outcome",)),
    "resumed_transfers": Definition("Resumed transfers after an initial one, because of a small pool or a loss"),
    "losses": Definition("Producers that were lost or could not serve, by the error's code", ("code",)),
    "failovers": Definition("Requests to the router for another producer, by outcome", ("outcome",)),
    "tokens": Definition("Tokens of embeddings that have arrived complete"),
    "embedding_bytes": Definition("Bytes of embeddings that have arrived complete"),
    "wire_bytes": Definition("Bytes of embeddings that were received over a transport and verified"),
    "repeated_bytes": Definition("Received bytes that were damaged or received before"),
    "failures": Definition("Embeddings that could not be obtained, by the error's code", ("code",)),
    "requests_failed": Definition("Requests that failed because an embedding could not be obtained"),
    "encoded_here": Definition("Embeddings that could not be obtained and were encoded by the consumer itself"),
    "cache_hits": Definition("Embeddings that a request found at the consumer"),
    "asked_again": Definition(
        "Embeddings that the router expected at the consumer, which had to ask the router for them"
    ),
    "managers_replaced": Definition("Managers of transfers that had lost every transport and were replaced"),
    "items_encoded": Definition("Embeddings that a worker of the producer has encoded"),
    "items_offered": Definition("Embeddings that were offered for a request"),
    "encodes_saved": Definition("Offered embeddings that did not have to be encoded for their request"),
    "items_refused": Definition("Embeddings that could not be offered, by the error's code", ("code",)),
    "shared_cache_hits": Definition("Embeddings that a producer found in the cache that encoders share"),
    "shared_cache_misses": Definition("Lookups in that cache without an embedding, by reason", ("reason",)),
    "shared_cache_written_bytes": Definition("Bytes that a producer wrote into that cache"),
    "shared_cache_dropped": Definition("Encoded embeddings that were not written into it, by reason", ("reason",)),
    "offers_ended": Definition("Offers that have ended: fetched, unfetched, or displaced by a new one", ("outcome",)),
}
"""The exposition appends ``_total`` to each name."""

GAUGES = {
    "offered_bytes": Definition("Bytes of embeddings that are offered and not fetched; each embedding counts once"),
    "kept_bytes": Definition("Bytes of embeddings that are kept for later requests"),
    "shared_cache_bytes": Definition("Bytes in the folder that encoders share, as this producer saw it last"),
}

SECONDS = Definition("Seconds from a request's first need of an embedding to its last byte")
BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper bounds of the histogram's buckets, seconds."""

MAX_RECENT = 1024
"""Durations kept between two calls of :meth:`Counters.take_changes`."""

Key = tuple[str, str]
"""Name of a counter and value of its label, "" if it has none."""


class Counters(Collector):
    """The metrics of one engine. Any thread may count and collect."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Key] = Counter()
        self._taken: Counter[Key] = Counter()
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0
        self._recent: deque[float] = deque(maxlen=MAX_RECENT)
        self._gauges: dict[str, list[Callable[[], float]]] = {}

    def add(self, name: str, amount: int = 1, label: str = "") -> None:
        """Increments a counter. Raises KeyError for a name that is not in :data:`COUNTERS`."""
        assert bool(label) == bool(COUNTERS[name].labels)
        with self._lock:
            self._counts[name, label] += amount

    def add_gauge(self, name: str, value: Callable[[], float]) -> None:
        """Registers a function whose value is part of a gauge. A gauge without functions is not shown."""
        self._gauges.setdefault(name, []).append(value)

    def observe_seconds(self, seconds: float) -> None:
        with self._lock:
            self._buckets[bisect_left(BUCKETS, seconds)] += 1
            self._sum += seconds
            self._recent.append(seconds)

    def read(self) -> dict[Key, int]:
        """Returns the counters that have been used."""
        with self._lock:
            return dict(self._counts)

    def take_changes(self) -> dict[str, list[Any]]:
        """Returns the changes since the last call, nothing if there are none.

        ``counts`` are increments as (name, label value, amount), ``seconds`` the observed durations.
        """
        with self._lock:
            if self._counts == self._taken:
                return {}
            counts = [(*key, amount) for key, amount in (self._counts - self._taken).items()]
            seconds = list(self._recent)
            self._taken = self._counts.copy()
            self._recent.clear()
            return {"counts": counts, "seconds": seconds}

    def collect(self) -> Iterator[Metric]:
        """Yields every metric. prometheus_client calls this on each scrape, on the thread of the server."""
        with self._lock:
            counts, cumulative, total = dict(self._counts), list(accumulate(self._buckets)), self._sum
        for name, definition in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, definition.help, labels=definition.labels)
            if not definition.labels:
                counter.add_metric([], counts.get((name, ""), 0))
            for (counted, label), value in counts.items():
                if counted == name and label:
                    counter.add_metric([label], value)
            yield counter
        for name, parts in self._gauges.items():
            yield GaugeMetricFamily(PREFIX + name, GAUGES[name].help, value=sum(part() for part in parts))
        buckets = list(zip([*map(str, BUCKETS), "+Inf"], cumulative, strict=True))
        yield HistogramMetricFamily(PREFIX + "load_seconds", SECONDS.help, buckets=buckets, sum_value=total)


class MetricsServer:
    """Serves ``http://host:port/metrics`` until it is closed, at every path. Scrapers prove nothing."""

    def __init__(self, counters: Counters, host: str, port: int) -> None:
        """Starts to listen; port 0 takes any free port. Raises TransportError if the port is not available."""
        self._registry = CollectorRegistry()
        self._registry.register(counters)
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = socket.create_server(address, family=family, backlog=BACKLOG)
        except OSError as error:
            raise TransportError(f"metrics_port: cannot listen on {host}:{port}: {error}; choose another") from error
        self.port: int = sock.getsockname()[1]
        self._server = HttpServer(sock, self._answer, LIMITS, "embferry-metrics")

    def close(self) -> None:
        self._server.stop()

    def _answer(self, method: str, target: str, body: bytes) -> Answer:
        if method not in ("GET", "HEAD"):
            raise RequestError("method_not_allowed", "metrics are read with GET", HTTPStatus.METHOD_NOT_ALLOWED)
        return Answer(generate_latest(self._registry).decode(), headers={"Content-Type": CONTENT_TYPE_LATEST})
