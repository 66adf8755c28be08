"""Figures computed from samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec
import numpy as np

from .payloads import TOKEN_BYTES
from .results import Measurement


class Summary(msgspec.Struct, frozen=True):
    """Figures of one measurement: seconds, bytes a second, CPU seconds per 10⁹ bytes."""

    p50: float
    p99: float
    low: float
    """The first quartile of the times."""
    high: float
    """The third quartile of the times."""
    size: int
    """Bytes of all embeddings of a round."""
    sender_cpu: float
    receiver_cpu: float
    memory_beyond: int

    @property
    def goodput(self) -> float:
        return self.size / self.p50

    @property
    def quartiles(self) -> tuple[float, float]:
        """Goodput at the quartiles of the times, the smaller first."""
        return self.size / self.high, self.size / self.low


def summarize(measurement: Measurement) -> Summary | None:
    """Returns None for a measurement that failed or has no sample."""
    samples = measurement.samples
    if not samples or measurement.status != "ok":
        return None
    size = TOKEN_BYTES * sum(measurement.options.get("rooms") or [measurement.payload.tokens])
    low, p50, high, p99 = np.quantile([sample.seconds for sample in samples], (0.25, 0.5, 0.75, 0.99)).tolist()
    return Summary(
        p50=p50,
        p99=p99,
        low=low,
        high=high,
        size=size,
        sender_cpu=statistics.median(s.sender_cpu for s in samples) / size * 1e9,
        receiver_cpu=statistics.median(s.receiver_cpu for s in samples) / size * 1e9,
        memory_beyond=max(sample.memory_beyond for sample in samples),
    )


def jain(shares: Sequence[float]) -> float:
    """Returns Jain's index of fairness (Jain, Chiu, Hawe 1984): 1 if all are equal, 1/n if one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def fairness(measurement: Measurement) -> float | None:
    """Returns Jain's index over the goodputs of equal transfers that ran at once, the median of the rounds."""
    indices = [jain([1 / wait for wait in sample.waits]) for sample in measurement.samples if sample.waits]
    return statistics.median(indices) if indices else None
