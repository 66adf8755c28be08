"""Comparing answers."""

from __future__ import annotations

import msgspec
import pytest

from embferry.bench.serving import answers
from embferry.bench.serving.workload import Plan

from .examples import results, run, sample


def test_answers_are_compared_token_by_token() -> None:
    made = run(sample(0), sample(1, tokens=(1, 3)), sample(2, error="no"), sample(3))
    answers.compare(made, {number: sample(number) for number in range(3)})
    assert [each.wrong for each in made.samples] == [False, True, None, None]
    assert [each.right for each in made.samples] == [True, False, False, True]


def test_answers_without_tokens_are_compared_as_text() -> None:
    assert answers.differs(sample(0, tokens=(), text="a"), sample(0, tokens=(), text="b"))
    assert not answers.differs(sample(0, tokens=(), text="a"), sample(0, tokens=(1,), text="a"))


def test_answers_of_an_earlier_run_are_used_for_the_same_requests_only() -> None:
    earlier = results(run(sample(0), sample(1), plan=Plan(requests=2, rate=3.0)))
    plan = Plan(requests=2, burstiness_cv=4.9)
    assert answers.earlier(earlier, plan, 2) == {0: sample(0), 1: sample(1)}
    for other, tokens in ((msgspec.structs.replace(plan, seed=1), 2), (plan, 3)):
        with pytest.raises(ValueError, match="other requests"):
            answers.earlier(earlier, other, tokens)
