"""The report of a plan: text, JSON and plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import msgspec
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
PICTURES = text.Pictures(1, ((None, 100),))
SVG = "{http://www.w3.org/2000/svg}"


def test_the_report_names_what_to_take_and_why() -> None:
    head, table, tail = text.report(MODEL, ADVICE, SPEEDS, PICTURES)
    assert head[0] == "m: 1 picture a request (100 visual tokens), 4 KiB a visual token; 4 requests/s"
    assert sum(line.startswith("> ") for line in table) == 1
    assert tail[0] == f"take: {ADVICE.best.deployment.name}"
    assert tail[-1] == ADVICE.sentence
    assert "undivided, 3 instances" in "\n".join(table)


def test_the_object_is_json_and_says_the_same() -> None:
    found = json.loads(json.dumps(text.as_object(MODEL, ADVICE, SPEEDS, PICTURES)))
    assert [(row["encoders"], row["languages"]) for row in found["rows"]] == [(0, 3), (1, 2), (2, 1)]
    assert found["worth_it"] is ADVICE.is_worth
    assert found["pool"]["bytes"] == ADVICE.pool.tokens * 4096
    assert found["take"] in found["rows"]
    assert [row["used"] for row in found["rows"]] == [pytest.approx(4 / row.capacity) for row in ADVICE.rows]
    assert (found["images"], found["sizes"]) == (1, [{"size": None, "tokens": 100}])


def test_noisy_speeds_are_told_above_the_table() -> None:
    noisy = msgspec.structs.replace(SPEEDS, noise=0.4)
    head = text.report(MODEL, ADVICE, noisy, PICTURES).head
    assert head[2] == noisy.noisy
    assert text.as_object(MODEL, ADVICE, noisy, PICTURES)["noise"] == 0.4
    assert len(text.report(MODEL, ADVICE, SPEEDS, PICTURES).head) == 2


def test_a_row_that_does_not_carry_the_rate_has_no_times() -> None:
    advice = advise(WORKLOAD.asked(), 15.0, SPEEDS, 4096, devices=3)
    table = text.report(MODEL, advice, SPEEDS, PICTURES).table
    assert table[2].split()[-8:] == ["10.00", "150%", "-", "-", "-", "-", "-", "-"]
    row = text.as_object(MODEL, advice, SPEEDS, PICTURES)["rows"][1]
    assert (row["carries"], row["used"], row["ttft_p95"], row["throughput"]) == (False, 1.5, None, None)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((("8x8", 1),), "2 pictures a request (8x8 = 1 visual tokens)"),
        ((("8x8", 1), (None, 2000)), "2 pictures a request (8x8 = 1 visual tokens, 2,000 visual tokens, in turn)"),
    ],
)
def test_the_pictures_are_told_with_all_sizes(sizes: tuple[tuple[str | None, int], ...], words: str) -> None:
    assert text.Pictures(2, sizes).told == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0123, "12"), (59.9, "59,900"), (60.0, "60 s"), (75.34, "75.3 s"), (123456.0, "123,000 s")]
)
def test_long_times_are_in_seconds(seconds: float, words: str) -> None:
    assert text.time_text(seconds) == words


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
