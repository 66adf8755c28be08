"""The report of a serving benchmark."""

from __future__ import annotations

from pathlib import Path

from embferry.bench import results as files
from embferry.bench.report import Table
from embferry.bench.serving.report import report
from embferry.bench.serving.results import ServingResults
from embferry.bench.show import html, markdown

from .examples import results, run, sample


def compared() -> ServingResults:
    counted = {"resumes": 3.0, "bytes sent twice": 2_500_000.0, "encodes saved": None}
    return results(
        run(sample(0, wrong=False), sample(1, wrong=True), sample(2, error="HTTP 500"), counters=counted),
        run(name="ours-nixl", status="error", reason="nixl is not installed"),
        run(name="example", status="skipped", reason="has no pool"),
        run(sample(0, wrong=False), scenario="An encoder killed", notes=["an encoder was killed"]),
    )


def table(made: ServingResults, title: str) -> Table:
    (found,) = [each for each in report(made).tables if each.title == title]
    return found


def test_the_first_table_compares_the_configurations_in_all_scenarios() -> None:
    answer = report(compared()).tables[0]
    assert answer.columns == ("configuration", "Everything fits", "An encoder killed")
    assert answer.rows[0].cells == ("ours-tcp", "200 (0.2 s), 1 failed, 1 wrong", "200 (0.2 s)")
    assert [row.cells[1] for row in answer.rows[1:]] == ["did not start", "–"]


def test_the_title_names_the_engine() -> None:
    made = compared()
    assert report(made).title == "vLLM, undivided and divided"
    made.engine = "SGLang"
    assert report(made).title == "SGLang, undivided and divided"


def test_a_scenario_has_a_row_for_each_configuration() -> None:
    rows = table(compared(), "Everything fits").rows
    ours = dict(zip(table(compared(), "Everything fits").columns, rows[0].cells, strict=True))
    assert (ours["requests"], ours["failed"], ours["wrong"]) == ("3", "1", "1")
    assert (ours["resumes"], ours["encodes saved"]) == ("3", "not reported")
    assert [row.kind for row in rows[1:]] == ["error", "skipped"]


def test_rounds_are_pooled_and_shown_side_by_side() -> None:
    rounds = [run(*(sample(n, ttft=t) for n in range(4)), round=r) for r, t in ((1, 0.3), (2, 0.5), (3, 0.4))]
    (row,) = table(results(*rounds), "Everything fits").rows
    assert (row.cells[1], row.cells[4], row.cells[-1]) == ("12", "400", "300, 500, 400")


def test_notes_say_what_was_damaged_and_why_requests_failed() -> None:
    notes = report(compared()).notes
    assert "ours-tcp, Everything fits, round 1: 1 failed: HTTP 500" in notes
    assert "An encoder killed: an encoder was killed" in notes


def test_notes_say_until_when_requests_went_wrong_after_an_encoder_was_killed() -> None:
    bad = [sample(0, wrong=True), sample(3, error="HTTP 502"), sample(4, wrong=True), sample(5, wrong=False)]
    recovered, not_recovered = run(*bad, damaged_at=1.5), run(*bad[:3], name="example", damaged_at=1.5)
    notes = report(results(recovered, not_recovered, run(bad[3], damaged_at=1.5))).notes
    assert [note for note in notes if "went wrong" in note] == [
        "ours-tcp, Everything fits, round 1: requests went wrong until 2.5 s later",
        "example, Everything fits, round 1: requests went wrong until the end of the run",
    ]


def test_an_endpoint_has_the_figures_of_vllms_bench() -> None:
    one = results(run(sample(0), sample(1, error="HTTP 500: no"), counters={"resumes": 0.0}), compared=False)
    totals = dict(row.cells for row in report(one).tables[0].rows)
    assert (totals["successful requests"], totals["failed requests"]) == ("1", "1")
    assert (totals["resumes"], totals["encodes saved"]) == ("0", "not reported")
    assert [row.cells for row in table(one, "Why requests failed").rows] == [("HTTP 500: no", "1")]
    assert len(report(one).problems) == 1


def test_an_interrupted_run_is_marked_as_incomplete() -> None:
    half = results(run(sample(0), complete=False), complete=False)
    assert "incomplete" in table(half, "Everything fits").rows[0].cells[0]
    assert "incomplete" in dict(report(half).facts)
    assert report(half).problems == ["ours-tcp, Everything fits: interrupted"]
    assert "Interrupted" in report(results(run(sample(0), complete=False), compared=False)).tables[0].note


def test_a_run_without_samples_is_shown() -> None:
    (row,) = report(results(run(complete=False), compared=False)).tables[0].rows
    assert row.kind == "error"
    (row,) = table(results(run(complete=False)), "Everything fits").rows
    assert (row.kind, "interrupted" in row.cells[1]) == ("error", True)


def test_a_comparison_fails_if_a_configuration_does_not_start_but_not_for_damage() -> None:
    assert report(compared()).problems == ["ours-nixl, Everything fits: nixl is not installed"]


def test_results_are_the_same_after_they_were_saved_and_shown_alike_on_the_page(tmp_path: Path) -> None:
    files.save(compared(), tmp_path / "serve.json")
    loaded = files.load(tmp_path / "serve.json", ServingResults)
    assert loaded == compared()
    assert markdown(report(loaded)) == markdown(report(compared()))
    assert all(each.title in html(report(loaded)) for each in report(loaded).tables)
