"""``embferry keys``: the keys and certificates of a cluster."""

from __future__ import annotations

import typer

from embferry.cli import certificates

app = typer.Typer(no_args_is_help=True, help="Make keys and certificates of a cluster.", rich_markup_mode=None)
app.command("ca")(certificates.ca)
app.command("cert")(certificates.cert)
