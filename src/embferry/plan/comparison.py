"""Predictions beside the results of ``embferry bench serve``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import msgspec

from embferry.bench.serving.configurations import ENCODERS
from embferry.bench.serving.results import Run, ServingResults
from embferry.bench.serving.workload import requests

from .deployment import Deployment
from .errors import ResultsInvalid
from .pool import Pool
from .simulation import plays
from .speeds import Speeds
from .workload import Asked

TOLERANCE = 0.2
MOST_SECONDS, MOST_TOKENS = 1e7, 1 << 20
"""Bounds of the time of a run or a first token, and of a prompt or an answer."""
UNDIVIDED = "undivided"
"""Name of the undivided engine in a comparison."""


class Point(msgspec.Struct, frozen=True):
    """One workload at one deployment: median time to first token and requests a second, by plan and by clock."""

    title: str
    deployment: Deployment
    predicted_ttft: float
    measured_ttft: float
    predicted_rate: float
    measured_rate: float

    @property
    def ttft_error(self) -> float:
        return self.predicted_ttft / self.measured_ttft - 1

    @property
    def rate_error(self) -> float:
        return self.predicted_rate / self.measured_rate - 1

    @property
    def holds(self) -> bool:
        """Whether both are within the tolerance."""
        return max(abs(self.ttft_error), abs(self.rate_error)) <= TOLERANCE


def compared(
    runs: Sequence[Run], deployment: Deployment, speeds: Speeds, token_bytes: int = 0, pool: Pool | None = None
) -> Point:
    """Returns the prediction for a workload, beside what several runs of it measured: the median of their medians.

    The rounds of a workload differ in what was drawn. Each is played with its own requests, and a median of few
    requests is compared with medians of as many.

    Args:
        runs: Of one workload at one deployment, at least one.
        deployment: The instances that were measured.
        speeds: How long each stage takes.
        token_bytes: Bytes of a visual token of an embedding.
        pool: Of each language instance.

    Raises:
        ResultsInvalid: the runs cannot be predicted.
    """
    if any(not 0 < run.duration < MOST_SECONDS for run in runs):
        raise ResultsInvalid(f"{runs[0].title} is damaged: it took {runs[0].duration:g} s")
    played = [plays(asked_in(run), deployment, speeds, token_bytes, pool, run.concurrency) for run in runs]
    measured = [_ttft(run) for run in runs]
    return Point(
        title=runs[0].scenario or runs[0].title,
        deployment=deployment,
        predicted_ttft=median(median(outcome.ttft() for outcome in one) for one in played),
        measured_ttft=median(measured),
        predicted_rate=median(median(outcome.throughput for outcome in one) for one in played),
        measured_rate=median(run.rate(len(run.right)) for run in runs),
    )


def by_workload(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the runs with samples: the rounds of one workload at one deployment together."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.samples:
            found.setdefault((run.name, run.scenario), []).append(run)
    return list(found.values())


def deployment_of(run: Run, results: ServingResults, given: Deployment) -> Deployment:
    """Returns the instances of a run: those that ``embferry bench serve --compare`` starts, or else those given."""
    if not results.compared:
        return given
    return Deployment(0 if run.name == UNDIVIDED else len(ENCODERS), 1)


def asked_in(run: Run) -> list[Asked]:
    """Returns the requests of a run, as they were sent.

    Raises:
        ResultsInvalid: a request failed, pictures were repeated, which caches answer, or a figure is impossible.
    """
    if run.plan is None or not run.samples:
        raise ResultsInvalid(f"{run.title} has no workload whose times are known; give results of embferry bench serve")
    if run.errors or run.wrong:
        raise ResultsInvalid(f"{run.title}: {run.errors + run.wrong} requests failed, and a plan has no failures")
    if any(sample.repeated for sample in run.samples):
        raise ResultsInvalid(f"{run.title}: pictures were sent again, and a plan knows no caches; measure --repeated 0")
    if run.plan.requests > len(run.samples):
        raise ResultsInvalid(f"{run.title} was interrupted; a plan needs all of its requests")
    if wrong := _impossible(run):
        raise ResultsInvalid(f"{run.title} is damaged: {wrong}")
    samples = {sample.number: sample for sample in run.samples}
    try:
        sent = requests(run.plan)
    except (ValueError, OverflowError) as error:
        raise ResultsInvalid(f"{run.title} is damaged: {error}") from error
    made = []
    for one in sent:
        sample = samples.get(one.number)
        if sample is None:
            raise ResultsInvalid(f"{run.title} was interrupted; a plan needs all of its requests")
        tokens = tuple(picture.tokens for picture in one.pictures)
        text = max(1, (sample.prompt_tokens or 0) - sum(tokens))
        made.append(Asked(one.at, tokens, text, max(1, sample.output_tokens)))
    return made


def _impossible(run: Run) -> str:
    """Returns which figure no run can have; empty if there is none."""
    if run.concurrency < 0:
        return f"{run.concurrency} requests at once"
    for sample in run.samples:
        if sample.ttft is None or not 0 < sample.ttft < MOST_SECONDS:
            return f"request {sample.number} has no time to first token"
        if max(sample.output_tokens, sample.prompt_tokens or 0) > MOST_TOKENS:
            return f"request {sample.number} has more than {MOST_TOKENS:,} tokens"
    return ""


def _ttft(run: Run) -> float:
    return median(sample.ttft for sample in run.right if sample.ttft is not None)


def table(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Returns the rows of a table, its head first."""
    head = ("workload", "deployment", "TTFT p50 ms", "measured", "error", "answered /s", "measured", "error", "")
    rows = [
        (
            one.title,
            one.deployment.name,
            f"{one.predicted_ttft * 1e3:.0f}",
            f"{one.measured_ttft * 1e3:.0f}",
            _percent(one.ttft_error),
            f"{one.predicted_rate:.2f}",
            f"{one.measured_rate:.2f}",
            _percent(one.rate_error),
            "" if one.holds else f"outside {TOLERANCE:.0%}",
        )
        for one in points
    ]
    return [head, *rows]


def _percent(error: float) -> str:
    return f"{error:+.0%}" if math.isfinite(error) else "-"
