"""``embferry probe``: the health check of a container. The entry of the command has a shorter way to it."""

from __future__ import annotations

from typing import Annotated

import typer

from embferry.cli.health import probe


def command(
    url: Annotated[
        str,
        typer.Argument(
            help="Where the part listens, such as 127.0.0.1:8000/ready; /health without a path.", metavar="URL"
        ),
    ],
) -> None:
    """Ask a part whether it is well, as health checks of containers do.

    The exit status is 0 if the answer is 200, else 1. With the TLS files of a part in the environment it asks by https
    and shows the certificate, which workers demand.
    """
    raise typer.Exit(probe(url))
