"""Results as tables, Markdown, drawings and a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from embferry.bench import markdown, page, report, results
from tests.bench import made

VOID = {"meta", "br", "path", "use"}


class Wellformed(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def drawn() -> str:
    return page.html(made.everything())


def test_results_are_the_same_after_they_were_saved(tmp_path: Path) -> None:
    before = made.everything()
    results.save(before, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == before


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 1}', "[1, 2]"])
def test_what_is_no_results_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"no results of this program"):
        results.load(tmp_path / "results.json")


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    other = made.everything()
    other.schema += 1
    results.save(other, tmp_path / "results.json")
    with pytest.raises(ValueError, match="format 2"):
        results.load(tmp_path / "results.json")


def test_every_row_has_all_columns() -> None:
    shown = report.tables(made.everything())
    titles = ["67 MB", "1 MiB", "One embedding", "Size of", "Transfers at", "1 MiB behind", "Verif", "Early", "Where"]
    assert all(table.title.startswith(title) for table, title in zip(shown, titles, strict=True))
    assert all(len(row.cells) == len(table.columns) for table in shown for row in table.rows)


def test_the_fastest_is_first_and_who_could_not_take_part_is_last_with_the_reason() -> None:
    rows = next(report.comparisons(made.everything())).rows
    assert [row.cells[0].split(",")[0] for row in rows[:2]] == ["memory copy", "shm"]
    assert [row.kind for row in rows[-2:]] == ["missing", "error"]
    assert rows[-2].cells[1] == "MISSING: safetensors is not installed: pip install <it>"
    assert rows[-1].cells[1] == "ERROR: receiver: killed by SIGSEGV | in 'make'"


def test_markdown_has_every_table_and_no_cell_breaks_one() -> None:
    text = markdown.text(made.everything())
    for table in report.tables(made.everything()):
        assert f"### {table.title}\n" in text
    lines = [line for line in text.splitlines() if line.startswith(("| safetensors", "| NIXL"))]
    assert lines
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(report.COLUMNS) + 1 for line in lines)


def test_markdown_replaces_what_is_between_the_marks_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text(f"# Before\n\n{markdown.BEGIN}\nwhat was\n{markdown.END}\n\n# After\n")
    markdown.write(made.everything(), document)
    once = document.read_text()
    markdown.write(made.everything(), document)
    assert document.read_text() == once
    assert once.startswith(f"# Before\n\n{markdown.BEGIN}\n")
    assert once.endswith(f"{markdown.END}\n\n# After\n")
    assert "what was" not in once


def test_a_document_without_marks_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("mine\n")
    with pytest.raises(ValueError, match="no place for results"):
        markdown.write(made.everything(), document)
    assert document.read_text() == "mine\n"


def test_the_page_is_well_formed_and_no_two_parts_share_a_name(drawn: str) -> None:
    parser = Wellformed()
    parser.feed(drawn)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn)) <= set(parser.ids)


def test_the_page_needs_nothing_else(drawn: str) -> None:
    assert not re.search(r'<(script|link|img|iframe)|src="|@import', drawn)
    assert not re.search(r'href="(?!#)', drawn)


def test_the_page_shows_what_the_tables_show(drawn: str) -> None:
    parser = Wellformed()
    parser.feed(drawn)
    for table in report.tables(made.everything()):
        assert table.title in parser.text
        assert all(row.cells[0] in parser.text for row in table.rows)
    assert "pip install <it>" in parser.text  # escaped, so it is text and no element


def test_there_is_a_page_of_nothing() -> None:
    assert "not measured" in page.html(made.results())
