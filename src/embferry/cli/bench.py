"""``embferry bench``: measurements on the user's own machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embferry.cli import bench_serve
from embferry.cli.options import fail

if TYPE_CHECKING:
    from embferry.bench.transfer.results import TransferResults
    from embferry.bench.transfer.run import Choice

SOME_FAILED, INTERRUPTED = 1, 130

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Measure on this machine."""


app.command("serve")(bench_serve.command)


@app.command("transfer")
def transfer(
    payload: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="1MiB, 67MB, 403MB or any size; may be repeated. [default: these three]"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Candidates, such as shm, tcp/verified, direct, copy*; may be repeated."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each; by default more for small payloads.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer variants and rounds, two payloads, no sweeps.")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results.json and index.html.")] = Path(
        "bench-results"
    ),
    sweeps: Annotated[
        bool, typer.Option(help="Also vary the pool, how many run at once, and when they are announced.")
    ] = True,
    storage: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder through which files are shared; a temporary one by default."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")] = None,
    show: Annotated[
        Path | None, typer.Option(metavar="RESULTS", help="Measure nothing: show an earlier results.json.")
    ] = None,
) -> None:
    """Compare every transport with memory copies, sockets, Mooncake, NIXL, ZeroMQ, files and HTTP."""
    try:
        from embferry.bench import output, results
        from embferry.bench.transfer.report import report as report_of
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("matplotlib", "jinja2"):
            raise
        fail(f"{error.name} is not installed; install it with: pip install 'embferry[bench]'")
    from embferry.bench.transfer.results import TransferResults

    saved = show or out / "results.json"
    try:
        if show is not None:
            found = results.load(show, TransferResults)
        else:
            found = _measured(_choice(payload, only, rounds, quick, sweeps, storage), saved)
        report = report_of(found)
        output.present(report, saved.with_name("index.html"), markdown)
    except (OSError, ValueError) as error:
        fail(str(error))
    typer.echo(f"{saved.with_name('index.html')} has plots and our own targets, {saved} every sample", err=True)
    for problem in report.problems:
        typer.echo(f"failed: {problem}", err=True)
    if show is None and not found.complete:
        raise typer.Exit(INTERRUPTED)
    if report.problems:
        raise typer.Exit(SOME_FAILED)


def _choice(
    payload: list[str] | None,
    only: list[str] | None,
    rounds: int | None,
    quick: bool,
    sweeps: bool,
    storage: Path | None,
) -> Choice:
    """Reads sizes and names of candidates.

    Raises:
        ValueError: one of them does not exist.
    """
    from embferry.bench.transfer.candidates import matching
    from embferry.bench.transfer.payloads import parse
    from embferry.bench.transfer.run import Choice

    return Choice(
        payloads=tuple(map(parse, payload or ())),
        only=tuple(matching(only or [])),
        rounds=rounds,
        quick=quick,
        sweeps=sweeps,
        storage=None if storage is None else str(storage),
    )


def _measured(choice: Choice, path: Path) -> TransferResults:
    from embferry.bench import machine, output, terminal
    from embferry.bench.transfer.results import TransferResults
    from embferry.bench.transfer.run import plan, run, total_rounds

    batches = plan(choice)
    command = shlex.join(["embferry", *sys.argv[1:]])
    found = TransferResults.begin(command, machine.describe(machine.PACKAGES), quick=choice.quick)
    with terminal.progress(total_rounds(batches), "rounds") as progress:
        output.measured(found, path, lambda: run(choice, batches, found, progress))
    return found
