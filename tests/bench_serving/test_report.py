"""What is shown of results that were made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from embferry.bench.serving import markdown, report
from embferry.bench.serving import results as files
from embferry.bench.serving.results import Event

from .made import results, run, sample


def cells(made: files.Results, title: str) -> list[tuple[str, ...]]:
    return [row.cells for table in report.tables(made) if table.title == title for row in table.rows]


def compared() -> files.Results:
    fits = "Everything fits"
    small, killed = "A small pool", "An encoder killed in the middle"
    failed = run(scenario=fits, name="ours-nixl", status="error", reason="nixl is not installed")
    skipped = run(scenario=fits, name="example", status="skipped", reason="has no pool")
    counted = {"resumes": 3.0, "bytes sent twice": 2_500_000.0, "encodes saved": None}
    dead = run(
        *(sample(i, began=0.0, latency=float(i), error="" if i != 3 else "HTTP 503: gone") for i in range(1, 6)),
        scenario=killed,
        events=[Event(2.5, "killed")],
        notes=["something to note"],
    )
    return results(
        run(sample(0, wrong=False), sample(1, wrong=True), sample(2, error="HTTP 500"), counters=counted),
        failed,
        skipped,
        run(sample(0, wrong=False), sample(1, error="no whole answer within 60 s", latency=60.0), scenario=small),
        dead,
    )


def test_a_row_a_configuration_has_every_figure() -> None:
    rows = cells(compared(), "Everything fits")
    ours = ("EPD, ours-tcp", "3", "1", "1", "200", "200", "250", "250", "0.5", "3", "2.50 MB", "not reported", "0.25")
    assert rows[0] == ours
    assert rows[1][:2] == ("EPD, ours-nixl", "ERROR: nixl is not installed")
    assert rows[2][:2] == ("EPD, example", "has no pool")


def test_rounds_stand_side_by_side_and_make_one_row() -> None:
    each = [run(*(sample(n, ttft=t) for n in range(4)), round=r) for r, t in ((1, 0.3), (2, 0.5), (3, 0.4))]
    whole, by_round = report.tables(results(*each))[:2]
    assert [row.cells[1] for row in whole.rows] == ["12"]
    assert whole.rows[0].cells[4] == "400"
    assert by_round.rows[0].cells == ("EPD, ours-tcp", "300, 500, 400", "400")


def test_few_requests_are_shown_one_by_one() -> None:
    assert cells(compared(), "One by one")[-2:] == [
        ("EPD, ours-tcp", "1", "405", "0.25", "right"),
        ("EPD, ours-tcp", "2", "405", "60.00", "failed: no whole answer within 60 s"),
    ]


def test_what_was_broken_is_shown_with_who_suffered() -> None:
    (row,) = cells(compared(), "From then on")
    assert row == ("EPD, ours-tcp", "at 2.5 s killed", "3", "1 (33%)", "0", "5.00", "not within the run")


def test_an_endpoint_alone_is_shown_as_vllms_bench_does() -> None:
    alone = results(run(sample(0), sample(1, error="HTTP 500: no"), counters={"resumes": 0.0}), compared=False)
    totals = {row[0]: row[1] for row in cells(alone, "EPD, ours-tcp")}
    assert (totals["successful requests"], totals["failed requests"]) == ("1", "1")
    assert (totals["resumes"], totals["encodes saved"]) == ("0", "not reported")
    assert [row[0] for row in cells(alone, "Times in ms, of right answers")] == ["TTFT", "TPOT", "ITL", "E2EL"]
    assert cells(alone, "Why requests failed") == [("HTTP 500: no", "1")]
    assert report.problems(alone) == ["EPD, ours-tcp, Everything fits: 1 of 2 requests failed, 0 answers are wrong"]


def test_what_was_interrupted_says_so() -> None:
    half = run(sample(0), complete=False)
    assert cells(results(half), "Everything fits")[0][0] == "EPD, ours-tcp (incomplete)"
    assert ("incomplete", "it was interrupted") in report.facts(results(half, complete=False))
    (table,) = [t for t in report.tables(results(half, compared=False)) if t.title == "EPD, ours-tcp"]
    assert "incomplete" in table.note
    assert report.problems(results(half)) == ["EPD, ours-tcp, Everything fits: interrupted"]


def test_a_run_without_samples_is_shown() -> None:
    assert cells(results(run(complete=False), compared=False), "EPD, ours-tcp")[0] == ("failed", "no request has ended")
    assert (
        cells(results(run(complete=False)), "Everything fits")[0][1] == "ERROR: interrupted before a request had ended"
    )


def test_a_comparison_fails_for_what_did_not_start_not_for_what_was_broken() -> None:
    assert report.problems(compared()) == ["EPD, ours-nixl, Everything fits: nixl is not installed"]


def test_results_survive_their_file(tmp_path: Path) -> None:
    made = compared()
    files.save(made, tmp_path / "serve.json")
    assert files.load(tmp_path / "serve.json") == made
    (tmp_path / "serve.json").write_text("{}")
    with pytest.raises(ValueError, match="no results of bench serve"):
        files.load(tmp_path / "serve.json")
    made.schema = 99
    files.save(made, tmp_path / "serve.json")
    with pytest.raises(ValueError, match="format 99"):
        files.load(tmp_path / "serve.json")


def test_markdown_has_all_of_it_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    markdown.write(compared(), path)
    text = path.read_text()
    assert text.startswith(f"before\n{markdown.BEGIN}\n\n- command: `embferry bench serve --compare`\n")
    assert text.endswith(f"{markdown.END}\nafter\n")
    assert "old" not in text
    assert "| EPD, ours-tcp | 3 | 1 | 1 |" in text
    assert "- model: a tiny one" in text
    assert "- EPD, ours-tcp, An encoder killed in the middle: something to note" in text
