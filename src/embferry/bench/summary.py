"""What raw samples say, in a few numbers. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from .results import Measurement


class Summary(msgspec.Struct, frozen=True):
    """Of one measurement. Seconds, bytes a second, CPU seconds a 10**9 bytes."""

    rounds: int
    p50: float
    p99: float
    least: float
    most: float
    low: float
    """The quartiles of the times."""
    high: float
    goodput: float
    sender_cpu: float
    receiver_cpu: float
    memory_beyond: int
    wire: float | None
    """Bytes that crossed over payload."""


def summarize(measurement: Measurement) -> Summary | None:
    """None without a sample."""
    samples = measurement.samples
    if not samples:
        return None
    seconds, size = [sample.seconds for sample in samples], total_bytes(measurement)
    wires = [sample.wire_bytes for sample in samples if sample.wire_bytes is not None]
    return Summary(
        rounds=len(samples),
        p50=statistics.median(seconds),
        p99=quantile(seconds, 0.99),
        least=min(seconds),
        most=max(seconds),
        low=quantile(seconds, 0.25),
        high=quantile(seconds, 0.75),
        goodput=size / statistics.median(seconds),
        sender_cpu=statistics.median(s.sender_cpu for s in samples) / size * 1e9,
        receiver_cpu=statistics.median(s.receiver_cpu for s in samples) / size * 1e9,
        memory_beyond=max(sample.memory_beyond for sample in samples),
        wire=statistics.median(wires) / size if wires else None,
    )


def total_bytes(measurement: Measurement) -> int:
    """Bytes of all embeddings of one round."""
    return measurement.payload.size * int(measurement.options.get("count", 1))


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest (Hyndman and Fan's type 7, numpy's default).

    :raises ValueError: no values, or a share outside of [0, 1]."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"no quantile {share} of {len(values)} values")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness (Jain, Chiu, Hawe 1984): 1 when all are equal, 1/n when one has all.

    :raises ValueError: no shares, or nothing but zeros."""
    squares = sum(share * share for share in shares)
    if not squares:
        raise ValueError("nobody has a share")
    return sum(shares) ** 2 / (len(shares) * squares)


def fairness(measurement: Measurement) -> float | None:
    """Jain's index over the goodputs of transfers that ran at once, the median of the rounds; None: not a crowd."""
    indices = []
    for sample in measurement.samples:
        if ready := sample.details.get("ready"):
            indices.append(jain([1e9 / (at - sample.details["began"]) for at in ready]))
    return statistics.median(indices) if indices else None


class Behind(msgspec.Struct, frozen=True):
    """Times of small transfers, seconds: alone, and behind a large one."""

    alone: tuple[float, ...]
    behind: tuple[float, ...]


def behind(measurement: Measurement) -> Behind | None:
    """None: no such measurement, or the large one was through before a small one was."""
    alone: list[float] = []
    loaded: list[float] = []
    for sample in measurement.samples:
        d = sample.details
        if "small_began" not in d:
            continue
        for index, (began, ready) in enumerate(zip(d["small_began"], d["small_ready"], strict=True)):
            if index < d["unloaded"]:
                alone.append((ready - began) / 1e9)
            elif d["large_began"] <= began < d["large_ready"]:
                loaded.append((ready - began) / 1e9)
    return Behind(tuple(alone), tuple(loaded)) if alone and loaded else None
