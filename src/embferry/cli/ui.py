"""``embferry ui``: shows where the live page of a router is, and opens it if there is a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Annotated

import typer

from embferry.cli.ask import DEFAULT_URL
from embferry.cli.ask_failures import no_router, reason
from embferry.cli.ask_words import base_url
from embferry.cli.options import fail
from embferry.protocol.errors import TlsFailed
from embferry.trust.tls import dialling_with
from embferry.trust.trust import TLS_ENV


def command(
    url: Annotated[
        str, typer.Option(help="The router's URL, with or without http:// and /v1.", metavar="URL")
    ] = DEFAULT_URL,
    ca: Annotated[
        str,
        typer.Option(help="PEM file with the CA of a router at https://.", metavar="FILE", envvar=TLS_ENV[0]),
    ] = "",
    browser: Annotated[bool, typer.Option(help="Open the page in a browser, if there is one.")] = True,
) -> None:
    """Print the address of a router's live page, and open it."""
    import httpx

    url = base_url(url, "https" if ca else "http")
    try:
        verify = dialling_with(ca) if ca else True
        timeout = httpx.Timeout(30, connect=5)
        with (
            httpx.Client(base_url=url, timeout=timeout, trust_env=False, verify=verify) as client,
            client.stream("GET", "/") as response,  # its head is enough
        ):
            is_page = response.status_code == 200 and response.headers.get("content-type", "").startswith("text/html")
    except TlsFailed as error:
        fail(error.detail)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(reason(url, error, ca), status=1)
    if not is_page:
        fail(f"{no_router(response)}, or one of an older version without the page", status=1)
    typer.echo(f"{url}/")
    if browser and _has_browser():
        webbrowser.open(f"{url}/")


def _has_browser() -> bool:
    """Returns whether a browser can open a window; one of text would take the terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
