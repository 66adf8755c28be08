"""Figures against examples that were computed by hand."""

from __future__ import annotations

import pytest

from embferry.bench.serving.results import Event, Run
from embferry.bench.serving.summary import pooled, right_again, spread, summarize, tpot

from .made import run, sample


def test_figures_are_those_of_vllms_bench() -> None:
    measured = run(
        sample(0, ttft=0.1, itls=(0.2, 0.2), output_tokens=3, prompt_tokens=10),
        sample(1, ttft=0.3, itls=(0.1,), output_tokens=2, prompt_tokens=20),
        sample(2, error="HTTP 500: no", ttft=None, itls=(), latency=5.0, output_tokens=0),
        duration=10.0,
    )
    s = summarize(measured)
    assert (s.requests, s.successful, s.failed, s.errors, s.wrong) == (3, 2, 1, 1, 0)
    assert (s.input_tokens, s.output_tokens) == (30, 5)
    assert (s.request_throughput, s.output_throughput, s.total_throughput) == (0.2, 0.5, 3.5)
    assert s.ttft is not None
    assert (s.ttft.mean, s.ttft.median, s.ttft.p99) == pytest.approx((0.2, 0.2, 0.298))
    assert s.itl is not None
    assert (s.itl.mean, s.itl.median) == pytest.approx((0.5 / 3, 0.2))
    assert s.tpot is not None
    assert s.tpot.mean == pytest.approx((0.2 + 0.1) / 2)
    assert s.e2el is not None
    assert s.e2el.mean == pytest.approx((0.5 + 0.4) / 2)
    assert s.longest_wait == 5.0


def test_a_wrong_answer_is_a_failure_and_makes_no_figures() -> None:
    s = summarize(run(sample(0, ttft=0.1, wrong=False), sample(1, ttft=9.0, wrong=True), duration=1.0))
    assert (s.successful, s.failed, s.errors, s.wrong) == (1, 1, 0, 1)
    assert s.ttft is not None
    assert s.ttft.p99 == 0.1


def test_rounds_are_pooled() -> None:
    first = run(sample(0, ttft=0.1), sample(1, ttft=0.3), counters={"resumes": 1.0, "encodes saved": None})
    second = run(sample(0, ttft=0.5), duration=2.0, counters={"resumes": 2.0, "encodes saved": None}, round=2)
    failed = run(status="error", reason="it did not start", round=3)
    made = pooled([first, failed, second])
    assert [each.ttft for each in made.samples] == [0.1, 0.3, 0.5]
    assert (made.duration, made.counters) == (6.0, {"resumes": 3.0, "encodes saved": None})
    assert pooled([first, failed]) is first
    assert pooled([failed]) is failed


def test_one_token_has_no_time_a_token() -> None:
    assert tpot(sample(0, output_tokens=1)) is None
    assert tpot(sample(0, ttft=0.5, itls=(0.5, 1.0), output_tokens=4)) == pytest.approx(0.5)


def test_nothing_makes_no_figures() -> None:
    assert spread([]) is None
    s = summarize(run(sample(0, error="no", ttft=None, itls=())))
    assert (s.ttft, s.tpot, s.itl, s.e2el) == (None, None, None, None)
    assert s.total_throughput is not None
    with pytest.raises(ValueError, match="no sample"):
        summarize(run())


def test_input_tokens_are_unknown_when_one_answer_does_not_say() -> None:
    s = summarize(run(sample(0, prompt_tokens=5), sample(1, prompt_tokens=None)))
    assert (s.input_tokens, s.total_throughput) == (None, None)


def broken(*requests: tuple[float, float, str]) -> Run:
    """Requests that begin then, end then, and how; something is broken at 10 s."""
    made = run(
        *(sample(i, began=began, latency=end - began, error=error) for i, (began, end, error) in enumerate(requests))
    )
    made.events = [Event(10.0, "broken")]
    return made


@pytest.mark.parametrize(
    ("requests", "again"),
    [
        ([(1, 9, ""), (2, 11, "")], 0.0),
        ([(1, 9, "before"), (2, 11, "")], 0.0),
        ([(1, 70, "no"), (11, 12, "")], 0.0),
        ([(9, 12, "no"), (13, 90, "no"), (14, 15, "")], 3.0),
        ([(9, 12, ""), (13, 14, "no")], None),
    ],
)
def test_right_again_counts_from_what_was_done(requests: list[tuple[float, float, str]], again: float | None) -> None:
    assert right_again(broken(*requests)) == again


def test_where_nothing_was_done_nothing_is_right_again() -> None:
    assert right_again(run(sample(0))) is None
