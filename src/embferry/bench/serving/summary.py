"""What the samples of a run say, in the figures of ``vllm bench serve``, by its definitions. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..summary import quantile
from .results import Run, Sample


class Spread(msgspec.Struct, frozen=True):
    """Seconds."""

    mean: float
    median: float
    p99: float


class Summary(msgspec.Struct, frozen=True):
    """Rates are a second of the run. Times and tokens are those of requests with a right answer; None: there is
    nothing to make it of."""

    requests: int
    successful: int
    errors: int
    """Without an answer."""
    wrong: int
    """With another answer than the undivided engine's."""
    duration: float
    input_tokens: int | None
    """As the server counts; None: it does not say."""
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float | None
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2el: Spread | None
    longest_wait: float
    """Of any request, failed ones included, from when it was sent until its end was known."""

    @property
    def failed(self) -> int:
        return self.errors + self.wrong


def summarize(run: Run) -> Summary:
    """:raises ValueError: the run has no sample."""
    if not run.samples:
        raise ValueError(f"{run.name} has no sample")
    right = [sample for sample in run.samples if sample.right]
    told = [sample.prompt_tokens for sample in right if sample.prompt_tokens is not None]
    entered = sum(told) if len(told) == len(right) else None
    came = sum(sample.output_tokens for sample in right)
    seconds = max(run.duration, 1e-9)
    return Summary(
        requests=len(run.samples),
        successful=len(right),
        errors=sum(not sample.answered for sample in run.samples),
        wrong=sum(sample.answered and bool(sample.wrong) for sample in run.samples),
        duration=run.duration,
        input_tokens=entered,
        output_tokens=came,
        request_throughput=len(right) / seconds,
        output_throughput=came / seconds,
        total_throughput=None if entered is None else (entered + came) / seconds,
        ttft=spread([sample.ttft for sample in right if sample.ttft is not None]),
        tpot=spread([each for sample in right if (each := tpot(sample)) is not None]),
        itl=spread([gap for sample in right for gap in sample.itls]),
        e2el=spread([sample.latency for sample in right]),
        longest_wait=max(sample.latency for sample in run.samples),
    )


def pooled(rounds: Sequence[Run]) -> Run:
    """The rounds of one configuration in one scenario as one run; those that brought nothing are left out."""
    ran = [run for run in rounds if run.samples]
    if len(ran) < 2:
        return ran[0] if ran else rounds[0]
    names = dict.fromkeys(name for run in ran for name in run.counters)
    return msgspec.structs.replace(
        ran[0],
        samples=[sample for run in ran for sample in run.samples],
        duration=sum(run.duration for run in ran),
        complete=all(run.complete for run in ran),
        counters={name: _sum([run.counters.get(name) for run in ran]) for name in names},
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def tpot(sample: Sample) -> float | None:
    """Time per output token after the first; None: there was but one."""
    if sample.output_tokens <= 1 or sample.ttft is None:
        return None
    return (sample.latency - sample.ttft) / (sample.output_tokens - 1)


def spread(values: Sequence[float]) -> Spread | None:
    """None: no values."""
    if not values:
        return None
    return Spread(sum(values) / len(values), quantile(values, 0.5), quantile(values, 0.99))


def right_again(run: Run) -> float | None:
    """Seconds after the first event of the run from which on every request that was sent had a right answer. 0: all
    that were sent after it. None: not even the last one, or there was no event."""
    if not run.events:
        return None
    at = run.events[0].at
    bad = [sample.began for sample in run.samples if not sample.right and sample.ended > at]
    if not bad:
        return 0.0
    last = max(bad)
    return max(0.0, last - at) if any(sample.right and sample.began > last for sample in run.samples) else None
