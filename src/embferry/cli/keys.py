"""``embferry keys``: makes and replaces cluster keys, and makes certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embferry.cli import certificates
from embferry.cli.options import fail
from embferry.cli.plain import PlainCommand
from embferry.protocol.errors import LocalProtocolError
from embferry.trust.keys import MOST_KEYS, ClusterKeys, Key, write_file

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make keys and certificates, of the cluster and of clients."
)
app.command("ca", cls=PlainCommand)(certificates.ca)
app.command("cert", cls=PlainCommand)(certificates.cert)

File = Annotated[Path, typer.Argument(metavar="FILE", show_default=False)]


@app.command(cls=PlainCommand)
def new(file: Annotated[Path | None, typer.Argument(metavar="[FILE]", show_default=False)] = None) -> None:
    """Make a cluster key in a new file, which only you may read. Without FILE: print the key.

    Give the file to every part of the cluster, with --cluster-key-file or EMBFERRY_CLUSTER_KEY_FILE. The key itself, or
    the content of the file, can be the value of EMBFERRY_CLUSTER_KEY.
    """
    key = Key.new()
    if file is None:
        typer.echo(key.written())
        return
    try:
        write_file(file, (key,), replace=False)
    except LocalProtocolError as error:
        fail(error.detail, status=1)
    typer.echo(f"made a cluster key in {file}", err=True)


@app.command(cls=PlainCommand)
def rotate(file: File) -> None:
    """Put a new key before the current one, which stays valid. An older one is dropped.

    Running parts read the file again with their next connection. Copies of the file on other machines may follow one
    after the other: two parts go on as long as they have one key in common. Rotate again only when all have followed.
    """
    try:
        if not file.exists():
            fail(f"{file} cannot be read: there is no such file; make one: embferry keys new {file}", status=1)
        keys = ClusterKeys.of_file(file).accepted()
        write_file(file, (Key.new(), *keys)[:MOST_KEYS], replace=True)
    except LocalProtocolError as error:
        fail(error.detail, status=1)
    dropped = "; the one before it is not valid any more" if len(keys) == MOST_KEYS else ""
    typer.echo(f"{file} has a new key; the last one stays valid beside it{dropped}", err=True)
