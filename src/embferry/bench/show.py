"""A report in the terminal, in Markdown and as one HTML page that loads nothing; the progress bar before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table as RichTable

from .report import Report, Table
from .results import Progress

TEMPLATE = Path(__file__).with_name("page.html.jinja")
STYLES = {
    "ours": "bold green",
    "engine": "yellow",
    "peer": "magenta",
    "limit": "dim",
    "good": "green",
    "bad": "red",
    "error": "bold red",
    "missing": "bold red",
    "skipped": "red",
}
WIDE = 190
"""Columns of the output when it does not go to a terminal."""


def present(report: Report, page: Path, document: Path | None) -> None:
    """Shows a report in the terminal, and writes it as an HTML page and, if asked for, as Markdown.

    Raises:
        ValueError: the Markdown file exists and has no place for results.
    """
    show(report)
    page.write_text(html(report))
    if document is not None:
        write_markdown(report, document)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Progress]:
    """Shows a bar of ``total`` rounds or requests on stderr; prints a line for each tenth if that is not a terminal."""
    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text)
    with Bar(*columns, console=console, transient=True) as bar:
        task, done, printed = bar.add_task("starting", total=total), 0, -1

        def update(what: str, more: int) -> None:
            nonlocal done, printed
            done += more
            bar.update(task, description=what, advance=more)
            tenth = done * 10 // max(1, total)
            if not console.is_terminal and tenth > printed:
                printed = tenth
                console.print(f"{done} of {total} {unit}; {what}", soft_wrap=True, markup=False)

        yield update


def show(report: Report) -> None:
    """Prints all tables but the folded ones, then the facts."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    for table in report.tables:
        if not table.folded:
            _print(console, table)
    for line in (*(f"{name}: {text}" for name, text in report.facts), *report.notes):
        console.print(line, soft_wrap=True)


def _print(console: Console, table: Table) -> None:
    shown = RichTable(title=table.title, caption=table.note or None, title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    for row in table.rows:
        if not row.failed:
            shown.add_row(*row.cells, style=STYLES.get(row.kind))
    console.print(shown)
    for row in table.rows:
        if row.failed:
            console.print(f"{row.cells[0]}: {row.cells[1]}", style=STYLES[row.kind])
    console.print()


def html(report: Report) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(report=report)


def markdown(report: Report) -> str:
    """Returns the report as Markdown; all tables but the first are folded, so that a document stays readable."""
    parts = [f"### {table.title}\n\n{_body(table)}" for table in report.tables[:1]]
    parts.append(_list(f"{name}: {f'`{text}`' if name == 'command' else text}" for name, text in report.facts))
    if report.notes:
        parts.append("Notes:\n\n" + _list(report.notes))
    for table in report.tables[1:]:
        parts.append(f"<details><summary>{table.title}</summary>\n\n{_body(table)}\n</details>\n")
    return "\n".join(parts)


def write_markdown(report: Report, path: Path) -> None:
    """Replaces the text between two marker comments in the file at ``path``; creates the file if there is none.

    Raises:
        ValueError: the file exists and has no such comments.
    """
    begin = f"<!-- results: written by embferry {report.verb} --markdown; do not edit -->"
    end = "<!-- end of results -->"
    written = f"{begin}\n\n{markdown(report)}\n{end}\n"
    if path.exists():
        before, found, rest = path.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{path} has no place for results; add the lines {begin!r} and {end!r} where they belong")
        written = before + written.rstrip("\n") + after
    path.write_text(written)


def _body(table: Table) -> str:
    note = f"{table.note}\n\n" if table.note else ""
    columns = len(table.columns)
    lines = [_line(table.columns), "|" + "|".join(["---"] + ["---:"] * (columns - 1)) + "|"]
    lines += [_line(row.cells + ("",) * (columns - len(row.cells))) for row in table.rows]
    return note + "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _list(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)
