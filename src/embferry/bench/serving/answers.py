"""Whether answers are those of an undivided engine: token by token, or letter by letter where it names no tokens."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .driver import Endpoint, Watch, drive
from .results import Answer, Results, Run, Sample
from .workload import Plan, Request

Answers = dict[int, Answer]
"""By the number of the request."""


def ask(endpoint: Endpoint, requests: Sequence[Request], urls: Sequence[list[str]], watch: Watch) -> Answers:
    """Each request alone, one after another.

    :raises ValueError: one was not answered, so there is nothing to compare with.
    :raises KeyboardInterrupt: it was interrupted."""
    alone = msgspec.structs.replace(endpoint, concurrency=1)
    measured = drive(alone, [msgspec.structs.replace(request, at=0.0) for request in requests], urls, watch)
    if not measured.complete:
        raise KeyboardInterrupt
    for sample in measured.samples:
        if not sample.answered:
            raise ValueError(f"{endpoint.url} does not answer request {sample.number}: {sample.error}")
    return of(measured.samples)


def of(samples: Sequence[Sample]) -> Answers:
    return {sample.number: Answer(sample.tokens, sample.text) for sample in samples if sample.answered}


def earlier(results: Results, plan: Plan, max_tokens: int) -> Answers:
    """Those of an earlier run of the same requests.

    :raises ValueError: none of its runs had them."""
    for run in results.runs:
        if run.plan is not None and run.max_tokens == max_tokens and same_requests(run.plan, plan) and run.complete:
            return of(run.samples)
    raise ValueError("the earlier results are of other requests; give the same seed, number, caps and --max-tokens")


def same_requests(one: Plan, other: Plan) -> bool:
    """Whether two plans differ at most in when the requests are sent."""
    timeless = {"rate": 1.0, "burstiness_cv": 1.0}
    return msgspec.structs.replace(one, **timeless) == msgspec.structs.replace(other, **timeless)


def compare(run: Run, answers: Answers) -> None:
    """Says of each sample whether it is wrong. What was not answered is neither; what there is nothing to compare with
    is left as it is."""
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
