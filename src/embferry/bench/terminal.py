"""A report in the terminal, and a progress bar while it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from . import results
from .report import Report, Table

STYLES = {
    "ours": "bold green",
    "engine": "yellow",
    "peer": "magenta",
    "limit": "dim",
    "faint": "dim",
    "good": "green",
    "bad": "red",
    "error": "bold red",
    "missing": "bold red",
    "skipped": "red",
}
WIDE = 190
"""Columns of the output when it does not go to a terminal."""


@contextmanager
def progress(total: int, unit: str) -> Iterator[results.Progress]:
    """Shows a bar on stderr; prints a line for each tenth if stderr is not a terminal.

    Args:
        total: how many rounds or requests there will be.
        unit: what they are called.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
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
    for table in report.open_tables:
        _show(console, table)
    for name, text in report.facts:
        console.print(f"{name}: {text}", soft_wrap=True)
    for note in report.notes:
        console.print(note, soft_wrap=True)


def _show(console: Console, table: Table) -> None:
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
