"""``embferry migrate PATH…`` rewrites code and log searches from the origin's earlier names to the present ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from embferry.cli.options import fail, need

# Stable, for scripts. Wrong usage ends with 2, as in every command.
DONE, OLD_NAMES_REMAIN, FILES_SKIPPED = 0, 1, 3


def command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files and folders.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Write without asking.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; end with 1 if old names remain.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the diff, write nothing.")] = False,
    assume: Annotated[bool, typer.Option("--assume", help="Treat every file as one that uses the system.")] = False,
) -> None:
    """Rewrite code that uses the origin's earlier names. Also log searches; the diff is shown first."""
    need("migrate", "libcst")
    from embferry.migrate import run

    missing = [path for path in paths if not path.exists()]
    if missing:
        fail(*(f"{path}: there is no such file or folder" for path in missing))
    plan = run.plan(paths, assume)
    # The diff goes to stdout, all else to stderr. typer.echo would fail on characters that the terminal cannot show.
    for change in plan.changes:
        sys.stdout.buffer.write(change.diff.encode("utf-8", "backslashreplace"))
    sys.stdout.flush()
    _show("doubtful", plan.doubtful)
    _show("left", plan.left)
    typer.echo(f"{plan.looked_at} files looked at, {len(plan.changes)} to change, {len(plan.left)} left", err=True)
    if plan.doubtful:
        typer.echo(f"doubtful places to look at yourself: {len(plan.doubtful)}", err=True)
    if plan.remaining:
        typer.echo(f"old word left in files of the system: {plan.remaining} lines", err=True)
    if check and (plan.changes or plan.remaining):
        raise typer.Exit(OLD_NAMES_REMAIN)
    unwritten: list[str] = []
    if plan.changes and not (check or dry_run):
        if not (yes or _agreed(len(plan.changes))):
            typer.echo("nothing was written", err=True)
            raise typer.Exit(OLD_NAMES_REMAIN)
        unwritten = run.apply(plan)
        _show("left", unwritten)
        typer.echo(f"{len(plan.changes) - len(unwritten)} files written", err=True)
    raise typer.Exit(FILES_SKIPPED if plan.left or unwritten else DONE)


def _show(kind: str, places: list[str]) -> None:
    for place in places:
        typer.echo(f"{kind}: {place}", err=True)


def _agreed(count: int) -> bool:
    typer.echo(f"Write {count} files? [y/N] ", nl=False, err=True)
    answer = sys.stdin.readline()
    if not answer:
        typer.echo("no answer; --yes writes without asking", err=True)
    return answer.strip().lower() in ("y", "yes")
