"""Ratios of configurations that ran side by side."""

from __future__ import annotations

import pytest

from embferry.bench.report import Table
from embferry.bench.serving import ratios
from embferry.bench.serving.report import report
from embferry.bench.serving.results import Run

from .examples import results, run, sample


def rounds(name: str, *ttfts: float, cpu: float = 1.0) -> list[Run]:
    """Returns a run of two requests for each time to first token."""
    return [run(sample(0, ttft=t), sample(1, ttft=t), name=name, round=n, cpu_seconds=cpu) for n, t in enumerate(ttfts)]


def table(*runs: Run, title: str) -> Table:
    made = results(*runs)
    made.side_by_side = True
    (found,) = [each for each in report(made).tables if each.title == title]
    return found


def test_a_ratio_is_the_median_of_those_within_each_round() -> None:
    """The machine was slow in the second round: that is not the fault of either."""
    ours, theirs = rounds("ours-shm", 0.1, 0.9, 0.3), rounds("example", 0.2, 1.0, 0.3)
    assert ratios.ratio(ratios.ttft, ours, theirs) == pytest.approx(0.9)
    assert ratios.ratio(ratios.ttft, theirs, ours) == pytest.approx(1 / 0.9)


def test_a_round_that_only_one_has_is_left_out() -> None:
    ours, theirs = rounds("ours-shm", 0.1, 0.2), rounds("example", 0.2)
    assert ratios.ratio(ratios.ttft, ours, theirs) == pytest.approx(0.5)
    assert ratios.ratio(ratios.ttft, ours, []) is None
    unanswered = [run(sample(0, error="HTTP 500", ttft=None), name="example", round=0)]
    assert ratios.ratio(ratios.ttft, ours, unanswered) is None


def test_each_configuration_is_compared_with_every_other() -> None:
    runs = rounds("undivided", 0.2) + rounds("example", 0.4, cpu=4.0) + rounds("ours-shm", 0.1, cpu=2.0)
    found = table(*runs, title="Time to first token")
    assert found.columns == ("configuration", "scenario", "ms", "/ undivided", "/ example", "/ ours-shm")
    assert [(row.cells[0], *row.cells[2:]) for row in found.rows] == [
        ("undivided", "200", "–", "0.50", "2.00"),
        ("example", "400", "2.00", "–", "4.00"),
        ("ours-shm", "100", "0.50", "0.25", "–"),
    ]
    spent = table(*runs, title="CPU time of all servers a request")
    assert [(row.cells[0], *row.cells[2:]) for row in spent.rows][2] == ("ours-shm", "1000", "2.00", "0.50", "–")


def test_a_picture_sent_again_is_compared_with_its_first_time() -> None:
    samples = [sample(n, ttft=t, repeated=n % 2) for n, t in enumerate((0.2, 0.1, 0.4, 0.1, 0.6, 0.3))]
    found = table(run(*samples, name="ours-shm", scenario="A picture again", plan=None), title="The same picture again")
    assert [row.cells for row in found.rows] == [("ours-shm", "A picture again", "400", "100", "0.25")]
    assert ratios.again(run(sample(0))) is None


def test_configurations_that_ran_one_after_another_have_no_ratios() -> None:
    titles = [each.title for each in report(results(*rounds("undivided", 0.2), *rounds("example", 0.4))).tables]
    assert "Time to first token" not in titles
