"""The command ``embferry`` and the list of its verbs."""

from __future__ import annotations

import os
import sys

import typer

from embferry.cli import ask, bench, bootstrap, encode, language, migrate, router, serve, version

app = typer.Typer(
    name="embferry",
    help="Serves vision-language models in separate workers: one encodes the pictures, another writes the answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _verb in (serve, router, encode, language, bootstrap, ask, migrate, version):
    app.command(_verb.__name__.rpartition(".")[2])(_verb.command)
app.add_typer(bench.app, name="bench")


def run() -> None:
    """Runs the command line. Ctrl-C ends with status 130, a closed pipe (``embferry ask … | head``) with 141."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
