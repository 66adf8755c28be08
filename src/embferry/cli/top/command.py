"""``embferry top``: the command."""

from __future__ import annotations

import os
import sys

from embferry.cli.activity.routers import ApiKey, Ca, Urls, routers
from embferry.cli.ask import DEFAULT_URL
from embferry.cli.options import fail, need


def command(
    url: Urls = [DEFAULT_URL],  # noqa: B006  (typer's way to say so; nothing changes it)
    ca: Ca = "",
    api_key: ApiKey = "",
) -> None:
    """Watch routers live in this terminal.

    It shows their workers, requests and transfers, and resumes, retries and errors as they happen.

    q ends it, ? shows the other keys. The routers' API key is read from EMBFERRY_ROUTER_API_KEY.
    """
    need("top", "textual")
    asked = routers(url, ca, api_key)
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        fail("embferry top needs a terminal, for its input, output and errors; elsewhere use: embferry status")
    if os.environ.get("TERM", "dumb") in ("", "dumb"):
        fail("this terminal (TERM=dumb) cannot be drawn on; use: embferry status")
    from embferry.cli.top.app import run

    run(asked)
