"""The report of a plan: text, JSON and plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan import plot, text
from embferry.plan.advice import advise
from embferry.plan.model import Model
from embferry.plan.outcome import Ended, Outcome
from embferry.plan.workload import Workload

from .examples import SPEEDS

WORKLOAD = Workload(pictures=(100,), rate=4.0, output_tokens=8, requests=60)
ADVICE = advise(WORKLOAD.asked(), 4.0, SPEEDS, 4096, block_size=16, devices=3)
MODEL = Model("m", 4096, None)
SVG = "{http://www.w3.org/2000/svg}"


def test_the_report_names_what_to_take_and_why() -> None:
    head, table, tail = text.report(MODEL, ADVICE, SPEEDS, "1 picture a request")
    assert head[0] == "m: 1 picture a request, 4 KiB a visual token; 4 requests/s"
    assert sum(line.startswith("> ") for line in table) == 1
    assert tail[0] == f"take: {ADVICE.best.deployment.name}"
    assert tail[-1] == ADVICE.sentence
    assert "undivided, 3 instances" in "\n".join(table)


def test_the_object_is_json_and_says_the_same() -> None:
    found = json.loads(json.dumps(text.as_object(MODEL, ADVICE, SPEEDS)))
    assert [(row["encoders"], row["languages"]) for row in found["rows"]] == [(0, 3), (1, 2), (2, 1)]
    assert found["worth_it"] is ADVICE.is_worth
    assert found["pool"]["bytes"] == ADVICE.pool.tokens * 4096
    assert found["take"] in found["rows"]


def test_columns_are_aligned() -> None:
    assert text.table([("a", "bb", "c"), ("ddd", "e", "")]) == ["a    bb  c", "ddd   e"]


@pytest.mark.parametrize(
    ("count", "words"), [(512, "512 B"), (1536, "1.5 KiB"), (3 << 20, "3 MiB"), (5 << 30, "5.0 GiB")]
)
def test_bytes_have_a_unit(count: int, words: str) -> None:
    assert text.bytes_text(count) == words


def test_the_plot_has_two_lines_of_each_deployment_and_what_is_asked() -> None:
    def play(rate: float) -> Outcome:
        return Outcome(requests=[Ended(0.0, 0.1 * rate, 1.0)], duration=1.0)

    lines = [plot.line(row, 10.0, play) for row in (ADVICE.undivided, ADVICE.split)]
    assert [one.kind for one in lines] == ["undivided", "split"]
    assert lines[0].points[0] == (pytest.approx(10 / 12), pytest.approx(1 / 12), pytest.approx(1 / 12))
    assert all(rate <= max(ADVICE.undivided.capacity, 10 / 12) for rate, *_ in lines[0].points)
    root = ElementTree.fromstring(plot.svg(lines, 4.0))
    kinds = [path.get("class") for path in root.iter(f"{SVG}path")]
    assert (kinds.count("split line"), kinds.count("split tail"), kinds.count("asked")) == (2, 1, 1)
    assert "4 asked" in [element.text for element in root.iter(f"{SVG}text")]


@given(st.floats(1e-4, 1e4))
def test_ticks_are_few_and_round(most: float) -> None:
    found = plot.ticks(most)
    assert 3 <= len(found) <= 11
    assert found[-1] <= most * (1 + 1e-6)
