"""Samples of ``embferry bench serve``, and the figures of ``vllm bench serve``, by its definitions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from ..results import Results
from .workload import Plan

Status = Literal["ok", "error", "skipped"]


class Sample(msgspec.Struct, frozen=True):
    """One request. Times in seconds; ``began`` since the run began, the others since ``began``."""

    number: int
    began: float
    pictures: int
    image_tokens: int
    repeated: int
    status: int | None
    """HTTP status; None if no answer came."""
    error: str
    """Why the request failed; empty if it was answered."""
    ttft: float | None
    """Until the first chunk with a choice."""
    itls: tuple[float, ...]
    """Between chunks with a choice."""
    latency: float
    """Until the last chunk with a choice, or until the failure was known."""
    output_tokens: int
    prompt_tokens: int | None
    """As the server counts; None if it does not say."""
    tokens: tuple[int, ...]
    text: str
    wrong: bool | None = None
    """True if the answer differs from the undivided engine's; None if it was not compared."""

    @property
    def right(self) -> bool:
        return not self.error and not self.wrong

    @property
    def ended(self) -> float:
        return self.began + self.latency

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there was no other token."""
        if self.output_tokens <= 1 or self.ttft is None:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


class Spread(NamedTuple):
    """Seconds; None if there is no value."""

    mean: float | None = None
    median: float | None = None
    p99: float | None = None


def spread(values: Sequence[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    if not known:
        return Spread()
    return Spread(statistics.mean(known), statistics.median(known), float(np.quantile(known, 0.99)))


class Run(msgspec.Struct):
    """One workload against one endpoint."""

    name: str
    """The configuration's name, or the endpoint's URL."""
    title: str
    scenario: str = ""
    round: int = 1
    status: Status = "ok"
    reason: str = ""
    """Why the status is not ``ok``."""
    plan: Plan | None = None
    max_tokens: int = 0
    concurrency: int = 0
    samples: list[Sample] = []
    duration: float = 0.0
    """Seconds from the first request to the end of the last."""
    complete: bool = True
    """False if the run was interrupted; the samples are those that had ended."""
    counters: dict[str, float | None] = {}
    """Rises of the servers' counters, by the names in :mod:`.counters`; None if no server reports one."""
    cpu_seconds: float | None = None
    """CPU time of all servers meanwhile; None if the servers are not ours, or were damaged."""
    notes: list[str] = []
    """Remarks for the report, such as the damage that was done."""
    damaged_at: float | None = None
    """Seconds from the first request until the damage was done that requests may notice; None if none was."""

    @property
    def right(self) -> list[Sample]:
        """Samples with a right answer. Rates, times and tokens are theirs; rates are per second of the run."""
        return [sample for sample in self.samples if sample.right]

    @property
    def errors(self) -> int:
        """Number of requests without an answer."""
        return sum(bool(sample.error) for sample in self.samples)

    @property
    def wrong(self) -> int:
        """Number of answers that differ from the undivided engine's."""
        return len(self.samples) - self.errors - len(self.right)

    @property
    def input_tokens(self) -> int | None:
        """As the server counts; None if it does not say."""
        told = [sample.prompt_tokens for sample in self.right]
        return None if None in told else sum(filter(None, told))

    @property
    def output_tokens(self) -> int:
        return sum(sample.output_tokens for sample in self.right)

    def rate(self, count: int) -> float:
        return count / max(self.duration, 1e-9)

    @property
    def times(self) -> dict[str, Spread]:
        return {
            "TTFT": spread([sample.ttft for sample in self.right]),
            "TPOT": spread([sample.tpot for sample in self.right]),
            "ITL": spread([gap for sample in self.right for gap in sample.itls]),
            "E2EL": spread([sample.latency for sample in self.right]),
        }

    @property
    def longest_wait(self) -> float:
        """The longest time until the end of a request was known, failed ones included."""
        return max(sample.latency for sample in self.samples)


class ServingResults(Results, tag="serving", kw_only=True):
    compared: bool = False
    """True if the servers were started here, to compare them."""
    side_by_side: bool = False
    """True if all servers ran at once and were asked by turns."""
    engine: str = "vLLM"
    """The engine that they have, as reports call it."""
    runs: list[Run] = msgspec.field(default_factory=list)
    setting: list[tuple[str, str]] = msgspec.field(default_factory=list)
    """More facts for the report."""


def pooled(rounds: Sequence[Run]) -> Run:
    """Returns the rounds of one configuration in one scenario as one run; rounds without samples are left out."""
    ran = [run for run in rounds if run.samples]
    if len(ran) < 2:
        return ran[0] if ran else rounds[0]
    counters: dict[str, float | None] = {}
    for name in dict.fromkeys(name for run in ran for name in run.counters):
        known = [value for run in ran if (value := run.counters.get(name)) is not None]
        counters[name] = sum(known) if known else None
    return msgspec.structs.replace(
        ran[0],
        samples=[sample for run in ran for sample in run.samples],
        duration=sum(run.duration for run in ran),
        complete=all(run.complete for run in ran),
        counters=counters,
    )
