"""Samples of ``embferry bench transfer``, and the figures computed from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
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
    """The candidates of one group took turns. There are several groups if memory did not suffice for all at once."""
    sweep: str = ""
    """The sweep it is a point of; empty for the comparison."""
    options: dict[str, Any] = {}

    @property
    def measured(self) -> bool:
        """Whether there are figures; the other properties need them."""
        return bool(self.samples) and self.status == "ok"

    @property
    def crosses(self) -> bool:
        """False for a copy within one process, which has only one side."""
        return self.kind != "limit" or self.candidate == "socket"

    @property
    def count(self) -> int:
        """Number of embeddings of a round."""
        one: int = self.options.get("count", 1)
        rooms: list[int] = self.options.get("rooms", [0])
        return one * len(rooms)

    @property
    def size(self) -> int:
        """Bytes of all embeddings of a round."""
        one: int = self.options.get("tokens", self.payload.tokens)
        tokens: list[int] = self.options.get("rooms", [one] * self.count)
        return TOKEN_BYTES * sum(tokens)

    def seconds(self, share: float) -> float:
        """Returns a quantile of the times."""
        return float(np.quantile([sample.seconds for sample in self.samples], share))

    @property
    def goodput(self) -> tuple[float, float, float]:
        """Bytes a second at the median, the third and the first quartile of the times."""
        return self.size / self.seconds(0.5), self.size / self.seconds(0.75), self.size / self.seconds(0.25)

    def cpu(self, used: Callable[[Sample], float]) -> float:
        """Returns CPU seconds per 10⁹ bytes, the median."""
        return statistics.median(map(used, self.samples)) / self.size * 1e9

    def cpu_of_one(self, used: Callable[[Sample], float]) -> float:
        """Returns CPU seconds of one transfer, the median of the rounds."""
        return statistics.median(map(used, self.samples)) / self.count

    def wait(self, share: float) -> float:
        """Returns a quantile of the times of single transfers, over all rounds; NaN if they were not measured."""
        waits = [wait for sample in self.samples for wait in sample.waits]
        return float(np.quantile(waits, share)) if waits else math.nan

    @property
    def fairness(self) -> float | None:
        """Jain's index over the goodputs of equal transfers that ran at once, the median of the rounds."""
        fair = [jain([1 / wait for wait in sample.waits]) for sample in self.samples if sample.waits]
        return statistics.median(fair) if fair else None


class TransferResults(Results, tag="transfer", kw_only=True):
    measurements: list[Measurement] = msgspec.field(default_factory=list)


def jain(shares: Sequence[float]) -> float:
    """Returns Jain's index of fairness (Jain, Chiu, Hawe 1984): 1 if all are equal, 1/n if one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))
