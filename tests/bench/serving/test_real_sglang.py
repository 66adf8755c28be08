"""A small comparison with SGLang's real servers."""

from __future__ import annotations

import sys

import pytest

from embferry.bench import machine
from embferry.bench.serving.compare import Comparison
from embferry.bench.serving.engines import SGLANG
from embferry.bench.serving.results import ServingResults

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]


def test_a_pool_smaller_than_the_embedding_and_a_damaged_picture() -> None:
    results = ServingResults.begin(machine.describe(machine.SERVING_PACKAGES))
    chosen = ["undivided", "ours-tcp", "damaged", "pool"]
    Comparison(sys.executable, chosen, quick=True, engine=SGLANG).run(results, lambda what, more: None)
    titles = {scenario.title: scenario.name for scenario in SGLANG.scenarios}
    runs = {(run.name, titles[run.scenario]): run for run in results.runs}
    assert set(runs) == {(name, scenario) for name in chosen[:2] for scenario in chosen[2:]}
    for (name, scenario), run in runs.items():
        assert (run.status, run.reason, run.errors, run.wrong) == ("ok", "", 0, 0), (name, scenario, run.samples)
        assert all(sample.tokens and sample.wrong is False for sample in run.samples)
    resumes = runs["ours-tcp", "pool"].counters["resumes"]
    assert resumes is not None
    assert resumes > 0
    (note,) = runs["ours-tcp", "damaged"].notes
    assert "with a damaged picture: HTTP 400" in note or "with a damaged picture: [400]" in note
