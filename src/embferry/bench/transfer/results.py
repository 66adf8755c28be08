"""Samples of ``embferry bench transfer``, and the figures computed from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from ..results import Results
from .payloads import TOKEN_BYTES, Payload

Status = Literal["ok", "missing", "error", "skipped"]
Kind = Literal["ours", "engine", "peer", "limit"]


class Sample(msgspec.Struct, frozen=True):
    """One round. Times in seconds, sizes in bytes."""

    seconds: float
    sender_cpu: float
    receiver_cpu: float
    memory_beyond: int
    """The receiver's peak so far, beyond what it had at first and beyond one payload."""
    transfers: int | None = None
    """Number of embferry's transfers, initial and resumed."""
    waits: list[float] = []
    """Seconds from the start until each embedding may be used, if a round has several."""


class Measurement(msgspec.Struct):
    """One candidate with one payload."""

    candidate: str
    label: str
    kind: Kind
    payload: Payload
    status: Status = "ok"
    reason: str = ""
    """Why the status is not ``ok``."""
    samples: list[Sample] = []
    group: int = 0
    """Those of one group took turns; there are several groups if memory did not suffice for all at once."""
    sweep: str = ""
    """The sweep it is a point of; empty for the comparison."""
    options: dict[str, Any] = {}

    @property
    def crosses(self) -> bool:
        """False for a copy within one process, which has only one side."""
        return self.kind != "limit" or self.candidate == "socket"


class TransferResults(Results, tag="transfer", kw_only=True):
    measurements: list[Measurement] = msgspec.field(default_factory=list)


class Summary(msgspec.Struct, frozen=True):
    """Figures of one measurement: seconds, bytes a second, CPU seconds per 10⁹ bytes."""

    p50: float
    p99: float
    goodput: float
    low: float
    """Goodput at the third quartile of the times."""
    high: float
    """Goodput at the first quartile of the times."""
    sender_cpu: float
    receiver_cpu: float
    memory_beyond: int
    fairness: float | None
    """Jain's index over the goodputs of equal transfers that ran at once, the median of the rounds."""


def summarize(measurement: Measurement) -> Summary | None:
    """Returns None for a measurement that failed or has no sample."""
    samples = measurement.samples
    if not samples or measurement.status != "ok":
        return None
    size = TOKEN_BYTES * sum(measurement.options.get("rooms") or [measurement.payload.tokens])
    short, p50, long, p99 = np.quantile([sample.seconds for sample in samples], (0.25, 0.5, 0.75, 0.99)).tolist()
    fair = [jain([1 / wait for wait in sample.waits]) for sample in samples if sample.waits]
    return Summary(
        *(p50, p99, size / p50, size / long, size / short),
        sender_cpu=statistics.median(s.sender_cpu for s in samples) / size * 1e9,
        receiver_cpu=statistics.median(s.receiver_cpu for s in samples) / size * 1e9,
        memory_beyond=max(sample.memory_beyond for sample in samples),
        fairness=statistics.median(fair) if fair else None,
    )


def jain(shares: Sequence[float]) -> float:
    """Returns Jain's index of fairness (Jain, Chiu, Hawe 1984): 1 if all are equal, 1/n if one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))
