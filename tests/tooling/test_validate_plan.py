"""The script that compares plans with the benchmark: its tables, from runs that went as predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

import validate_plan as script
from embferry.bench import machine
from embferry.bench.results import load, save
from embferry.bench.serving.results import Run, Sample
from embferry.bench.serving.workload import requests
from embferry.plan.simulation import plays
from embferry.plan.workload import Asked
from tests.plan.test_probes import TRUE, played

WORKLOAD = script.WORKLOADS[1]


def run(name: str) -> Run:
    """Returns a run that took as long as a play with the true speeds."""
    made = requests(WORKLOAD.plan)
    asked = [Asked(one.at, tuple(picture.tokens for picture in one.pictures), 30, 4) for one in made]
    outcome = plays(asked, script.WHOLE if name == script.UNDIVIDED.name else script.DIVIDED, TRUE)[0]
    samples = [
        Sample(
            one.number, one.at, len(one.pictures), one.image_tokens, 0, 200, "", ended.first - ended.began, (),
            ended.ended - ended.began, 4, one.image_tokens + 30, (), "x",
        )
        for one, ended in zip(made, outcome.requests, strict=True)
    ]  # fmt: skip
    return Run(name, name, WORKLOAD.title, plan=WORKLOAD.plan, samples=samples, duration=outcome.duration)


@pytest.fixture
def taken() -> script.Measured:
    found = script.Measured.begin(machine.describe({}))
    names = {script.UNDIVIDED.name: script.WHOLE, script.SPLIT.name: script.DIVIDED}
    found.probes = {name: [played(deployment)] for name, deployment in names.items()}
    found.runs = {name: [run(name)] for name in names}
    return found


def test_runs_that_went_as_predicted_are_within_the_tolerance(taken: script.Measured) -> None:
    found = script.points(taken, script.fit(taken))
    assert [point.deployment for point in found] == [script.WHOLE, script.DIVIDED]
    assert all(point.holds for point in found)


def test_the_page_gets_the_tables_between_its_marks(taken: script.Measured, tmp_path: Path) -> None:
    speeds = script.fit(taken)
    found = script.points(taken, speeds)
    said = script.verdicts(taken, found, speeds)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    script.write(page, script.document(taken, found, said, ["example"], "plot.svg"))
    text = page.read_text()
    assert text.startswith(f"before\n{script.BEGIN}\n\n| workload | deployment |")
    assert text.endswith(f"{script.END}\nafter\n")
    assert "2 of 2 points are within 20%." in text
    assert said[1][-1] in ("worth it", "not worth it")
    assert "old" not in text


def test_what_was_measured_is_read_again(taken: script.Measured, tmp_path: Path) -> None:
    save(taken, tmp_path / "plan.json")
    assert load(tmp_path / "plan.json", script.Measured) == taken


def test_the_page_has_the_marks() -> None:
    page = (script.ROOT / "docs" / "planning.md").read_text()
    assert page.index(script.BEGIN) < page.index(script.END)
