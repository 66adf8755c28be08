"""Compares answers with those of an undivided engine: token by token, or as text if an answer has no token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from .client import Endpoint, send_all
from .results import Run, Sample, ServingResults
from .workload import Plan, Request

Answers = dict[int, Sample]
"""Answered requests by their number."""


def ask(
    endpoint: Endpoint, requests: Sequence[Request], ended: Callable[[Sample], None] = lambda sample: None
) -> Answers:
    """Sends the requests one after another and returns the answers.

    Raises:
        ValueError: a request was not answered, so there is nothing to compare with.
        KeyboardInterrupt: interrupted.
    """
    alone, run = msgspec.structs.replace(endpoint, concurrency=1), Run(endpoint.url, endpoint.model)
    send_all(alone, [msgspec.structs.replace(request, at=0.0) for request in requests], run, ended)
    for sample in run.samples:
        if sample.error:
            raise ValueError(f"{endpoint.url} does not answer request {sample.number}: {sample.error}")
    return {sample.number: sample for sample in run.samples}


def earlier(results: ServingResults, plan: Plan, max_tokens: int) -> Answers:
    """Returns the answers of an earlier run of the same requests, whenever they were sent.

    Raises:
        ValueError: the results have no such run.
    """

    def timeless(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, rate=1.0, burstiness_cv=1.0)

    for run in results.runs:
        same = run.plan is not None and timeless(run.plan) == timeless(plan) and run.max_tokens == max_tokens
        if same and run.complete:
            return {sample.number: sample for sample in run.samples if not sample.error}
    raise ValueError("the earlier results are of other requests; give the same seed, number, caps and --max-tokens")


def compare(run: Run, answers: Answers) -> None:
    """Sets ``wrong`` in each answered sample for which there is an answer to compare with."""
    run.samples = [
        msgspec.structs.replace(sample, wrong=differs(sample, answers[sample.number]))
        if not sample.error and sample.number in answers
        else sample
        for sample in run.samples
    ]


def differs(sample: Sample, answer: Sample) -> bool:
    if sample.tokens and answer.tokens:
        return sample.tokens != answer.tokens
    return sample.text != answer.text
