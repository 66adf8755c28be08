"""Results in the terminal, and what is being done meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from .harness import Report
from .report import Table

STYLES = {
    "ours": "bold green",
    "engine": "yellow",
    "peer": "magenta",
    "limit": "dim",
    "missing": "bold red",
    "error": "bold red",
    "skipped": "red",
    "unmeasured": "dim",
    "yes": "green",
    "no": "red",
}

WIDE = 150
"""Columns, where there is no terminal."""


@contextmanager
def progress(rounds: int) -> Iterator[Report]:
    """A bar on stderr; without a terminal, a line now and then."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task, printed = bar.add_task("starting", total=rounds), -1
        done = 0

        def report(what: str, more: int) -> None:
            nonlocal done, printed
            done += more
            bar.update(task, description=what, advance=more)
            if not console.is_terminal and (tenth := done * 10 // max(1, rounds)) > printed:
                printed = tenth
                console.print(f"{done} of {rounds} rounds; {what}", soft_wrap=True)

        yield report


def show(tables: list[Table], wide: int = WIDE) -> None:
    """On stdout, ``wide`` columns where there is no terminal. Who could not take part is named below the table."""
    console = Console()
    if not console.is_terminal:
        console.width = wide
    for table in tables:
        shown = RichTable(title=table.title, caption=table.note or None, title_justify="left", title_style="bold")
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
        for row in table.rows:
            if not row.failed:
                shown.add_row(*row.cells, style=STYLES.get(row.kind))
        console.print(shown)
        for row in table.rows:
            if row.failed:
                console.print(f"{row.cells[0]}: {row.cells[1]}", style=STYLES[row.kind], markup=False, highlight=False)
        console.print()
