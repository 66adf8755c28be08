"""Results in a file, and reports as Markdown and as a page. The results are those of a transfer benchmark."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from embferry.bench import report, results, show
from embferry.bench.serving.results import ServingResults
from embferry.bench.transfer.report import report as report_of
from embferry.bench.transfer.results import TransferResults
from tests.bench.transfer import examples


class Parser(HTMLParser):
    """Checks that elements are closed in order; collects text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def whole() -> report.Report:
    return report_of(examples.everything())


@pytest.fixture(scope="module")
def drawn(whole: report.Report) -> str:
    return show.html(whole)


def test_results_are_the_same_after_they_were_saved(tmp_path: Path) -> None:
    before = examples.everything()
    results.save(before, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json", TransferResults) == before
    with pytest.raises(ValueError, match="no results of this benchmark"):
        results.load(tmp_path / "results.json", ServingResults)


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', "[1, 2]"])
def test_a_file_without_results_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="no results of this benchmark"):
        results.load(tmp_path / "results.json", TransferResults)


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    other = msgspec.structs.replace(examples.everything(), schema=99)
    results.save(other, tmp_path / "results.json")
    with pytest.raises(ValueError, match="format 99"):
        results.load(tmp_path / "results.json", TransferResults)


def test_an_interrupted_run_is_saved_as_incomplete(tmp_path: Path) -> None:
    with TransferResults.begin(examples.MACHINE).recording(tmp_path / "results.json"):
        raise KeyboardInterrupt
    found = results.load(tmp_path / "results.json", TransferResults)
    assert (found.complete, found.load_after is not None) == (False, True)
    assert "incomplete" in dict(report.facts(found))


def test_the_report_says_how_busy_the_machine_was() -> None:
    found = examples.everything()
    assert "busy" not in dict(report.facts(found))["load average"]
    found.load_before = (1.9, 0.0, 0.0)
    assert "busy" in dict(report.facts(found))["load average"]


def test_markdown_has_every_table_and_no_cell_breaks_a_row(whole: report.Report) -> None:
    text = show.markdown(whole)
    assert f"### {whole.tables[0].title}\n" in text
    for table in whole.tables:
        assert table.title in text
        for row in table.rows:
            (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {row.cells[0]} |")]
            assert len(re.findall(r"(?<!\\)\|", line)) in {len(t.columns) + 1 for t in whole.tables}


def test_markdown_replaces_only_the_text_between_its_markers(whole: report.Report, tmp_path: Path) -> None:
    begin, end = (
        "<!-- results: written by embferry bench transfer --markdown; do not edit -->",
        "<!-- end of results -->",
    )
    document = tmp_path / "benchmarks.md"
    document.write_text(f"# Before\n\n{begin}\nold\n{end}\n\n# After\n")
    show.write_markdown(whole, document)
    once = document.read_text()
    show.write_markdown(whole, document)
    assert document.read_text() == once
    assert once.startswith(f"# Before\n\n{begin}\n")
    assert once.endswith(f"{end}\n\n# After\n")
    assert "\nold\n" not in once


def test_the_page_is_well_formed(drawn: str) -> None:
    Parser(drawn)


def test_the_page_loads_nothing(drawn: str) -> None:
    assert not re.search(r'<(script|link|img|iframe)|src="|@import', drawn)
    assert not re.search(r'href="(?!#)', drawn)


def test_the_page_shows_every_row_and_escapes_its_text(whole: report.Report, drawn: str) -> None:
    text = Parser(drawn).text
    for table in whole.tables:
        assert table.title in text
        assert all(row.cells[0] in text for row in table.rows)
    assert "pip install <it>" in text
    bars = sum(not row.failed for table in whole.tables if table.longest_bar for row in table.rows)
    assert drawn.count("<svg") == bars > 0


def test_there_is_a_page_without_any_measurement() -> None:
    assert "This run" in Parser(show.html(report_of(examples.results()))).text
