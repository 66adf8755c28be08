"""The end of both verbs of ``embferry bench``: the report, its files, and the exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from embferry.cli.options import fail

if TYPE_CHECKING:
    from embferry.bench.report import Report
    from embferry.bench.results import Results

SOME_FAILED, INTERRUPTED = 1, 130


def need(*modules: str, extra: str) -> None:
    """Ends the process if a module is not installed."""
    for module in modules:
        if find_spec(module) is None:
            fail(f"{module} is not installed; install it with: pip install 'embferry[{extra}]'")


@contextmanager
def failures() -> Iterator[None]:
    """Ends the process with the text of an error that the user has caused."""
    try:
        yield
    except (OSError, ValueError) as error:
        fail(str(error))


def conclude(results: Results, report: Report, saved: Path, page: Path, markdown: Path | None, *, shown: bool) -> None:
    """Shows the report and ends the process with the status of the run; ``shown`` if it is an earlier one."""
    from embferry.bench.show import present

    present(report, page, markdown)
    typer.echo(f"{page} has the same with bars, {saved} every sample", err=True)
    for problem in report.problems:
        typer.echo(f"failed: {problem}", err=True)
    if not results.complete and not shown:
        raise typer.Exit(INTERRUPTED)
    if report.problems:
        raise typer.Exit(SOME_FAILED)
