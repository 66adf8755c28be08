"""Results in the terminal, and what is being done meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..terminal import show as show_tables
from .compare import Report
from .report import facts, notes, tables
from .results import Results

WIDE = 190
"""Columns, where there is no terminal."""


@contextmanager
def progress(requests: int) -> Iterator[Report]:
    """A bar on stderr; without a terminal, a line for each thing that is begun and for each tenth of the requests."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=requests)
        done, said, printed = 0, "", 0

        def report(what: str, more: int) -> None:
            nonlocal done, said, printed
            done += more
            bar.update(task, description=what, advance=more)
            tenth = done * 10 // max(1, requests)
            if not console.is_terminal and (what != said or tenth > printed):
                said, printed = what, tenth
                console.print(f"{done} of {requests} requests; {what}", soft_wrap=True, markup=False)

        yield report


def show(results: Results) -> None:
    """On stdout."""
    console = Console()
    for name, what in facts(results):
        console.print(f"{name}: {what}", markup=False, highlight=False, soft_wrap=True)
    console.print()
    show_tables(tables(results), WIDE)
    for note in notes(results):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
