"""``embferry bench``. ``transfer``: how each transport compares, on this machine, with what else could have been used."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embferry.cli import bench_serve
from embferry.cli.options import fail

if TYPE_CHECKING:
    from embferry.bench.results import Results
    from embferry.bench.run import Choice

SOME_FAILED = 1

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
        typer.Option(metavar="NAME", help="Contestants, such as shm, tcp/verified, direct, copy*; may be repeated."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each; more for small payloads if not given.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer contestants and rounds, two payloads, no sweeps.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results.json and index.html go.")] = Path(
        "bench-results"
    ),
    sweeps: Annotated[bool, typer.Option(help="Also what changes how fast our own transports are.")] = True,
    storage: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder that files are shared through; temporary if not given."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")] = None,
    show: Annotated[
        Path | None, typer.Option(metavar="RESULTS", help="Measure nothing: show an earlier results.json.")
    ] = None,
) -> None:
    """Compare every transport with memory copies, sockets, Mooncake, NIXL, ZeroMQ, files and HTTP, side by side."""
    try:
        from embferry.bench import page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        fail("matplotlib is not installed; install it with: pip install 'embferry[bench]'")
    from embferry.bench import markdown as markdown_of
    from embferry.bench import results as files
    from embferry.bench.report import tables
    from embferry.bench.run import failed
    from embferry.bench.terminal import show as show_tables

    if show is not None:
        try:
            results = files.load(show)
        except (OSError, ValueError) as error:
            fail(str(error))
    else:
        out.mkdir(parents=True, exist_ok=True)
        results = _measured(_choice(payload, only, rounds, quick, sweeps, storage))
        files.save(results, out / "results.json")
    show_tables(tables(results))
    target = show.parent if show is not None else out
    (target / "index.html").write_text(page.html(results))
    typer.echo(f"{target / 'index.html'} has this with plots, {show or out / 'results.json'} every sample", err=True)
    if markdown is not None:
        try:
            markdown_of.write(results, markdown)
        except ValueError as error:
            fail(str(error))
    for reason in failed(results):
        typer.echo(f"failed: {reason}", err=True)
    if failed(results):
        raise typer.Exit(SOME_FAILED)


def _choice(
    payload: list[str] | None,
    only: list[str] | None,
    rounds: int | None,
    quick: bool,
    sweeps: bool,
    storage: Path | None,
) -> Choice:
    """Ends the process with status 2 when a size or a name is wrong."""
    from embferry.bench.contestants import matching
    from embferry.bench.payloads import KNOWN, parse
    from embferry.bench.plan import QUICK
    from embferry.bench.run import Choice

    try:
        return Choice(
            payloads=tuple(map(parse, payload)) if payload else QUICK if quick else KNOWN,
            only=tuple(matching(only)) if only else None,
            rounds=rounds,
            quick=quick,
            sweeps=sweeps and not quick and not only,
            storage=None if storage is None else str(storage),
            command=shlex.join(["embferry", *sys.argv[1:]]),
        )
    except ValueError as error:
        fail(str(error))


def _measured(choice: Choice) -> Results:
    from embferry.bench.run import run, work
    from embferry.bench.terminal import progress

    todo = work(choice)
    # Asked to end from outside, it ends as with Ctrl-C: in order.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with progress(todo.rounds) as report:
            return run(choice, todo, report)
    finally:
        signal.signal(signal.SIGTERM, before)
