"""``embferry bench``: measurements on the user's own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embferry.cli import bench_serve
from embferry.cli.bench_results import conclude, failures, need
from embferry.cli.plain import PlainCommand

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Measure on this machine."""


app.command("serve", cls=PlainCommand)(bench_serve.command)


@app.command("transfer", cls=PlainCommand)
def transfer(
    payload: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="1MiB, 67MB, 403MB or any size; may be repeated. [default: these three]"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Candidates or sweeps, such as shm, direct, copy*, pool; may be repeated."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rounds of each; by default more for small payloads.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer variants, rounds, payloads and sweeps.")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results.json and index.html.")] = Path(
        "bench-results"
    ),
    sweeps: Annotated[
        bool, typer.Option(help="Also many small ones, and vary the pool, how many run at once, and the announcement.")
    ] = True,
    storage: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder through which files are shared; a temporary one by default."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")] = None,
    show: Annotated[
        Path | None, typer.Option(metavar="RESULTS", help="Measure nothing: show an earlier results.json.")
    ] = None,
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RESULTS]...", help="With --show: other runs, for the table of our own targets."),
    ] = None,
) -> None:
    """Compare every transport with its alternatives.

    They are memory copies, sockets, Mooncake, NIXL, ZeroMQ, files and HTTP.
    """
    need("jinja2", "zmq", extra="bench")
    from embferry.bench import machine
    from embferry.bench.results import load
    from embferry.bench.show import progress
    from embferry.bench.transfer import plan as plans
    from embferry.bench.transfer.payloads import parse
    from embferry.bench.transfer.report import report
    from embferry.bench.transfer.results import TransferResults

    saved = show or out / "results.json"
    others = more or []
    if others and show is None:
        raise typer.BadParameter("results are named without --show")
    with failures():
        other_runs = [load(path, TransferResults) for path in others]
        if show is not None:
            results = load(show, TransferResults)
        else:
            batches = plans.plan([*map(parse, payload or ())], only or [], rounds, quick, sweeps)
            results = TransferResults.begin(machine.describe(machine.PACKAGES), quick=quick)
            with progress(plans.total_rounds(batches), "rounds") as told, results.recording(saved):
                plans.run(batches, storage, results, told)
        page = saved.with_name("index.html")
        conclude(results, report(results, *other_runs), saved, page, markdown, shown=show is not None)
