"""Compares answers with those of an undivided engine: token by token, or as text if an answer has no token ids."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .client import Callbacks, Endpoint, send_all
from .results import Answer, Run, Sample, ServingResults
from .workload import Plan, Request

Answers = dict[int, Answer]
"""Completions by the number of the request."""


def ask(endpoint: Endpoint, requests: Sequence[Request], urls: Sequence[list[str]], callbacks: Callbacks) -> Answers:
    """Sends the requests one after another and returns the answers.

    Raises:
        ValueError: a request was not answered, so there is nothing to compare with.
        KeyboardInterrupt: interrupted.
    """
    alone = msgspec.structs.replace(endpoint, concurrency=1)
    measured = send_all(alone, [msgspec.structs.replace(request, at=0.0) for request in requests], urls, callbacks)
    if not measured.complete:
        raise KeyboardInterrupt
    for sample in measured.samples:
        if not sample.answered:
            raise ValueError(f"{endpoint.url} does not answer request {sample.number}: {sample.error}")
    return _of(measured.samples)


def earlier(results: ServingResults, plan: Plan, max_tokens: int) -> Answers:
    """Returns the answers of an earlier run of the same requests, whenever they were sent.

    Raises:
        ValueError: the results have no such run.
    """
    timeless = {"rate": 1.0, "burstiness_cv": 1.0}
    wanted = msgspec.structs.replace(plan, **timeless)
    for run in results.runs:
        if run.plan is None or run.max_tokens != max_tokens or not run.complete:
            continue
        if msgspec.structs.replace(run.plan, **timeless) == wanted:
            return _of(run.samples)
    raise ValueError("the earlier results are of other requests; give the same seed, number, caps and --max-tokens")


def compare(run: Run, answers: Answers) -> None:
    """Sets ``wrong`` in each answered sample for which there is an answer to compare with."""
    run.samples = [
        msgspec.structs.replace(sample, wrong=differs(sample, answers[sample.number]))
        if sample.answered and sample.number in answers
        else sample
        for sample in run.samples
    ]


def differs(sample: Sample, answer: Answer) -> bool:
    if sample.tokens and answer.tokens:
        return sample.tokens != answer.tokens
    return sample.text != answer.text


def _of(samples: Sequence[Sample]) -> Answers:
    return {sample.number: Answer(sample.tokens, sample.text) for sample in samples if sample.answered}
