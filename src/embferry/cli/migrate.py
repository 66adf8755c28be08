"""``embferry migrate PATH…``: code and log searches from the origin's earlier names to the present ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embferry.cli.options import fail

if TYPE_CHECKING:
    from embferry.migrate.run import Plan

# Stable: scripts rely on them. Bad usage is 2, as everywhere.
DONE = 0
OLD_NAMES_REMAIN = 1
FILES_LEFT = 3

_STEP = 100
"""Files between two words about progress."""
_ASSUME = "Take it that every file belongs to the system."


def command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files and folders.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Write without asking.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; end with 1 if old names remain.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the diff, write nothing.")] = False,
    assume: Annotated[bool, typer.Option("--assume", help=_ASSUME)] = False,
) -> None:
    """Rewrite code and log searches that use the origin's earlier names; the diff is shown first."""
    try:
        from embferry.migrate import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "libcst":
            raise
        fail("libcst is not installed; install it with: pip install 'embferry[migrate]'")
    missing = [path for path in paths if not path.exists()]
    if missing:
        fail(*(f"{path}: there is no such file or folder" for path in missing))
    plan = run.plan(paths, assume, _progress)
    _show(plan)
    if dry_run or check or not plan.changes:
        raise typer.Exit(OLD_NAMES_REMAIN if check and plan.changes else _ended(plan))
    if not yes and not _agreed(len(plan.changes)):
        typer.echo("nothing was written", err=True)
        raise typer.Exit(OLD_NAMES_REMAIN)
    unwritten = run.apply(plan)
    for left in unwritten:
        typer.echo(f"left: {left.path}: {left.reason}", err=True)
    typer.echo(f"{len(plan.changes) - len(unwritten)} files written", err=True)
    raise typer.Exit(FILES_LEFT if unwritten else _ended(plan))


def _show(plan: Plan) -> None:
    """The diff on stdout, everything else on stderr."""
    for change in plan.changes:
        # Not by typer.echo: what the terminal cannot show must not end the command.
        sys.stdout.buffer.write(change.diff.encode("utf-8", "backslashreplace"))
    sys.stdout.flush()
    for note in plan.notes:
        typer.echo(f"note: {note}", err=True)
    for left in plan.left:
        typer.echo(f"left: {left.path}: {left.reason}", err=True)
    changes, left_files = len(plan.changes), len(plan.left)
    typer.echo(f"{plan.looked_at} files looked at, {changes} to change, {left_files} left", err=True)


def _ended(plan: Plan) -> int:
    return FILES_LEFT if plan.left else DONE


def _agreed(count: int) -> bool:
    print(f"Write {count} files? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:
        typer.echo("nobody answered; --yes writes without asking", err=True)
    return answer.strip().lower() in ("y", "yes")


def _progress(looked_at: int) -> None:
    if looked_at % _STEP == 0 and sys.stderr.isatty():
        print(f"\r{looked_at} files looked at", end="\r", file=sys.stderr, flush=True)
