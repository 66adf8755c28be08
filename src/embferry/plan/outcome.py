"""The outcome of one play, with the figures of ``embferry bench serve``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import msgspec
import numpy as np


class Ended(NamedTuple):
    """Times of one request, in seconds: of its start, its first token and its last."""

    began: float
    first: float
    ended: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, and how busy the instances were.

    Attributes:
        requests: In the order in which they began.
        duration: Seconds from the first request to the end of the last.
        encoder_busy: Mean share of the time in which encoders were busy.
        language_busy: The same of language instances.
        resumes: Resumed transfers.
        peak_arriving: Most visual tokens under way to one language instance at once.
    """

    requests: list[Ended]
    duration: float
    encoder_busy: float = 0.0
    language_busy: float = 0.0
    resumes: int = 0
    peak_arriving: int = 0

    def ttft(self, share: float = 0.5) -> float:
        """Returns a quantile of the time to first token, in seconds."""
        return float(np.quantile([one.first - one.began for one in self.requests], share))

    def latency(self, share: float = 0.5) -> float:
        """Returns a quantile of the time to the last token, in seconds."""
        return float(np.quantile([one.ended - one.began for one in self.requests], share))

    @property
    def throughput(self) -> float:
        """Requests a second, from the first request to the end of the last."""
        return len(self.requests) / max(self.duration, 1e-9)


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns several outcomes as one: all their requests, one play after the other."""
    return Outcome(
        requests=[request for one in outcomes for request in one.requests],
        duration=sum(one.duration for one in outcomes),
        encoder_busy=mean(one.encoder_busy for one in outcomes),
        language_busy=mean(one.language_busy for one in outcomes),
        resumes=sum(one.resumes for one in outcomes),
        peak_arriving=max(one.peak_arriving for one in outcomes),
    )
