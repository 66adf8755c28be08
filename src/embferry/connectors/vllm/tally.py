"""Numbers of one engine's connector: counted wherever something happens, read by whoever shows them."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple


class Metric(NamedTuple):
    """``label``: the name of the one label that it has, if it has one."""

    help: str
    label: str = ""


PREFIX = "embferry_ec_"
COUNTERS = {
    "transfers": Metric("Transfers of embeddings that have ended", "outcome"),
    "resumed_transfers": Metric("Transfers of remaining data after an initial one, because of a small pool or a loss"),
    "losses": Metric("Producers that were lost or could not serve, by the reason's code", "code"),
    "replacements": Metric("Answers of the router that was asked for another producer", "outcome"),
    "tokens": Metric("Tokens of embeddings that have arrived whole"),
    "embedding_bytes": Metric("Bytes of embeddings that have arrived whole"),
    "wire_bytes": Metric("Bytes of embeddings that came over a transport and were looked at"),
    "bytes_sent_twice": Metric("Of those, the bytes that were damaged or came again"),
    "failures": Metric("Embeddings that could not be had, by the reason's code", "code"),
    "requests_failed": Metric("Requests that failed because an embedding could not be had"),
    "encoded_here": Metric("Embeddings that could not be had and were encoded by the consumer itself"),
    "cache_hits": Metric("Embeddings that a request found here"),
    "asked_again": Metric(
        "Embeddings that the router took to be here, and that were asked of it because they were not"
    ),
    "items_encoded": Metric("Embeddings that a worker of the producer has made"),
    "items_offered": Metric("Embeddings that were offered for a request"),
    "encodes_saved": Metric("Of those, the ones that nobody had to encode for it"),
    "items_refused": Metric("Embeddings that could not be offered, by the reason's code", "code"),
    "offers_ended": Metric("Rooms that were offered and have ended", "outcome"),
}
"""Each is shown with ``_total`` behind its name."""

GAUGES = {
    "offered_bytes": Metric("Bytes that are promised and have not been fetched; an embedding counts once"),
    "kept_bytes": Metric("Bytes of embeddings that are kept for the next request"),
}

SECONDS = Metric("From a request's first need of an embedding to its last byte")
BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Seconds, at most; what takes longer is in none of them."""

LATEST = 1024
"""Times that are kept until they are taken."""

Key = tuple[str, str]
"""A counter's name and its label's value; without a label, an empty one."""


class Reading(NamedTuple):
    """What has been counted; times as how many fell into each bucket, one more for the rest, and their sum."""

    counts: dict[Key, float]
    seconds: tuple[int, ...]
    seconds_sum: float


class Tally:
    """Any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Key] = Counter()
        self._seconds = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0
        self._latest: deque[float] = deque(maxlen=LATEST)
        self._gauges: dict[str, list[Callable[[], float]]] = {}

    def add(self, name: str, amount: int = 1, label: str = "") -> None:
        """
        :raises KeyError: nobody knows a counter of that name.
        """
        assert bool(label) == bool(COUNTERS[name].label)
        with self._lock:
            self._counts[name, label] += amount

    def gauge(self, name: str, value_of: Callable[[], float]) -> None:
        """Where a part of its present value is found; one that this engine does not have is not shown."""
        self._gauges.setdefault(name, []).append(value_of)

    def gauges(self) -> dict[str, float]:
        return {name: sum(value_of() for value_of in parts) for name, parts in self._gauges.items()}

    def took(self, seconds: float) -> None:
        with self._lock:
            self._seconds[bisect_left(BUCKETS, seconds)] += 1
            self._sum += seconds
            self._latest.append(seconds)

    def read(self) -> Reading:
        with self._lock:
            return Reading(dict(self._counts), tuple(self._seconds), self._sum)

    def take_latest(self) -> list[float]:
        """The times since the last call, at most so many."""
        with self._lock:
            latest = list(self._latest)
            self._latest.clear()
            return latest
