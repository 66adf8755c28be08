"""Figures compared with examples that were computed by hand."""

from __future__ import annotations

import pytest

from embferry.bench.serving.results import Spread, pooled, spread

from .examples import run, sample


def test_figures_follow_the_definitions_of_vllms_bench() -> None:
    s = run(
        sample(0, ttft=0.1, itls=(0.2, 0.2), output_tokens=3, prompt_tokens=10),
        sample(1, ttft=0.3, itls=(0.1,), output_tokens=2, prompt_tokens=20),
        sample(2, error="HTTP 500: no", ttft=None, itls=(), latency=5.0, output_tokens=0),
        duration=10.0,
    )
    assert (len(s.samples), len(s.right), s.errors, s.wrong) == (3, 2, 1, 0)
    assert (s.input_tokens, s.output_tokens) == (30, 5)
    assert (s.rate(len(s.right)), s.rate(s.output_tokens)) == (0.2, 0.5)
    assert (s.times["TTFT"].mean, s.times["TTFT"].median, s.times["TTFT"].p99) == pytest.approx((0.2, 0.2, 0.298))
    assert (s.times["ITL"].mean, s.times["ITL"].median) == pytest.approx((0.5 / 3, 0.2))
    assert s.times["TPOT"].mean == pytest.approx((0.2 + 0.1) / 2)
    assert s.times["E2EL"].mean == pytest.approx((0.5 + 0.4) / 2)
    assert s.longest_wait == 5.0


def test_a_wrong_answer_is_a_failure_and_does_not_count() -> None:
    s = run(sample(0, ttft=0.1, wrong=False), sample(1, ttft=9.0, wrong=True), duration=1.0)
    assert (len(s.right), s.errors, s.wrong) == (1, 0, 1)
    assert s.times["TTFT"].p99 == 0.1


def test_rounds_are_pooled() -> None:
    first = run(sample(0, ttft=0.1), sample(1, ttft=0.3), counters={"resumes": 1.0, "encodes saved": None})
    second = run(sample(0, ttft=0.5), duration=2.0, counters={"resumes": 2.0, "encodes saved": None}, round=2)
    failed = run(status="error", reason="it did not start", round=3)
    made = pooled([first, failed, second])
    assert [each.ttft for each in made.samples] == [0.1, 0.3, 0.5]
    assert (made.duration, made.counters) == (6.0, {"resumes": 3.0, "encodes saved": None})
    assert pooled([first, failed]) is first
    assert pooled([failed]) is failed


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    assert sample(0, output_tokens=1).tpot is None
    assert sample(0, ttft=0.5, itls=(0.5, 1.0), output_tokens=4).tpot == pytest.approx(0.5)


def test_there_are_no_times_without_right_answers() -> None:
    assert spread([]) == Spread()
    s = run(sample(0, error="no", ttft=None, itls=()))
    assert s.times == dict.fromkeys(("TTFT", "TPOT", "ITL", "E2EL"), Spread())


def test_input_tokens_are_unknown_when_one_answer_does_not_say() -> None:
    s = run(sample(0, prompt_tokens=5), sample(1, prompt_tokens=None))
    assert s.input_tokens is None
