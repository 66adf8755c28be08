"""The command ``embferry`` and the list of its verbs."""

from __future__ import annotations

import platform
import signal
import sys
from typing import Annotated

import typer

from embferry import __version__
from embferry.cli import api_keys, ask, bench, ec, keys, migrate, plan, probe, processes, status, ui
from embferry.cli.options import SettingsCommand
from embferry.cli.plain import PlainCommand
from embferry.cli.streams import open_missing, told
from embferry.cli.top import command as top
from embferry.observe.logs import own_process

app = typer.Typer(
    name="embferry",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

WIDE = {"max_content_width": 110}
"""The help of the commands with many options is as wide as the terminal, up to here."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"embferry {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serves vision-language models in separate workers: one encodes the pictures, another writes the answers."""


app.command("serve", cls=SettingsCommand, context_settings=WIDE)(processes.serve)
app.command("router", cls=SettingsCommand, context_settings=WIDE)(processes.router)
app.command("encode", cls=SettingsCommand, context_settings=WIDE)(processes.encode)
app.command("language", cls=SettingsCommand, context_settings=WIDE)(processes.language)
app.command("bootstrap", cls=SettingsCommand, context_settings=WIDE)(processes.bootstrap)
app.command("ask", cls=PlainCommand)(ask.command)
app.command("ui", cls=PlainCommand)(ui.command)
app.command("status", cls=PlainCommand)(status.command)
app.command("top", cls=PlainCommand)(top.command)
app.command("plan", cls=PlainCommand, context_settings=WIDE)(plan.command)
app.command("probe", cls=PlainCommand)(probe.command)
app.command("migrate", cls=PlainCommand)(migrate.command)
app.add_typer(bench.app, name="bench")
app.add_typer(ec.app, name="ec")
keys.app.add_typer(api_keys.app, name="api")
app.add_typer(keys.app, name="keys")


@app.command()
def version() -> None:
    """Print the version, and those of Python and the system."""
    typer.echo(f"embferry {__version__} (Python {platform.python_version()}, {platform.system()} {platform.machine()})")


def run() -> None:
    """Runs the command line.

    Ctrl-C ends with status 130; :mod:`embferry.cli.streams` says what ends it when its output cannot be written.
    """
    open_missing()
    own_process()
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as entry.py has left it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with told("embferry"):
            app()
    except KeyboardInterrupt:
        sys.exit(130)
