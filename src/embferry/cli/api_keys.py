"""``embferry keys api new``: makes an API key for a client of the router."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from embferry.cli.options import fail
from embferry.cli.plain import PlainCommand
from embferry.serve.http.api_keys import ApiKey, ApiKeysError, Limits, digest_of, new_key, parse, read

app = typer.Typer(name="api", no_args_is_help=True, help="API keys of the router's clients.")


@app.callback()
def root() -> None:
    """API keys of the router's clients."""


@app.command(cls=PlainCommand)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client's name, for logs and metrics.")],
    file: Annotated[
        Path, typer.Option(help="The file of router.api_keys_file; made if there is none.", metavar="FILE")
    ],
    requests: Annotated[int | None, typer.Option(help="Requests at once.", metavar="N")] = None,
    requests_per_second: Annotated[float | None, typer.Option(help="On average.", metavar="N")] = None,
    bytes_per_second: Annotated[float | None, typer.Option(help="Of request bodies, on average.", metavar="N")] = None,
) -> None:
    """Make an API key and print it, this once. The file has only its hash. A running router knows it at once.

    Without limits of its own the key has those of router.client_requests, router.client_requests_per_second and
    router.client_bytes_per_second. Delete its line from the file to end it.
    """
    key = new_key()
    entry = ApiKey(name, digest_of(key), Limits(requests, requests_per_second, bytes_per_second))
    try:
        known = read(file) if file.exists() else ()
        if any(name == one.name for one in known):
            fail(f"the name {name} is taken in {file}; choose another, or delete its line first")
        parse("\n".join(one.line() for one in (*known, entry)), str(file))  # refuses what the router would not read
    except ApiKeysError as error:
        fail(error.detail)
    try:
        _append(file, entry.line())
    except OSError as error:
        fail(f"{file} cannot be written: {error.strerror or error}")
    typer.echo(key)


def _append(file: Path, line: str) -> None:
    """Adds a line in one write, so that a router that reads meanwhile sees all of it or nothing."""
    with open(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        ends_open = size > 0 and os.pread(opened.fileno(), 1, size - 1) != b"\n"
        opened.write(b"\n" * ends_open + line.encode() + b"\n")
