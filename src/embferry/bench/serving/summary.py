"""The figures of ``vllm bench serve``, by its definitions, computed from samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec
import numpy as np

from .results import Run, Sample


class Spread(msgspec.Struct, frozen=True):
    """Seconds; None if there is no value."""

    mean: float | None = None
    median: float | None = None
    p99: float | None = None


class Summary(msgspec.Struct, frozen=True):
    """Rates are per second of the run. Times and tokens are those of requests with a right answer."""

    requests: int
    successful: int
    errors: int
    """Requests without an answer."""
    wrong: int
    """Requests with another answer than the undivided engine's."""
    duration: float
    input_tokens: int | None
    """As the server counts; None if it does not say."""
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float | None
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2el: Spread
    longest_wait: float
    """The longest time until the end of a request was known, failed ones included."""

    @property
    def failed(self) -> int:
        return self.errors + self.wrong


def summarize(run: Run) -> Summary:
    """Computes the figures of a run that has samples."""
    right = [sample for sample in run.samples if sample.right]
    told = [sample.prompt_tokens for sample in right if sample.prompt_tokens is not None]
    input_tokens = sum(told) if len(told) == len(right) else None
    output_tokens = sum(sample.output_tokens for sample in right)
    seconds = max(run.duration, 1e-9)
    return Summary(
        requests=len(run.samples),
        successful=len(right),
        errors=sum(not sample.answered for sample in run.samples),
        wrong=sum(sample.answered and bool(sample.wrong) for sample in run.samples),
        duration=run.duration,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        request_throughput=len(right) / seconds,
        output_throughput=output_tokens / seconds,
        total_throughput=None if input_tokens is None else (input_tokens + output_tokens) / seconds,
        ttft=spread([sample.ttft for sample in right if sample.ttft is not None]),
        tpot=spread([each for sample in right if (each := tpot(sample)) is not None]),
        itl=spread([gap for sample in right for gap in sample.itls]),
        e2el=spread([sample.latency for sample in right]),
        longest_wait=max(sample.latency for sample in run.samples),
    )


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


def tpot(sample: Sample) -> float | None:
    """Returns the time per output token after the first; None if there was no other token."""
    if sample.output_tokens <= 1 or sample.ttft is None:
        return None
    return (sample.latency - sample.ttft) / (sample.output_tokens - 1)


def spread(values: Sequence[float]) -> Spread:
    if not values:
        return Spread()
    return Spread(statistics.mean(values), statistics.median(values), float(np.quantile(values, 0.99)))
