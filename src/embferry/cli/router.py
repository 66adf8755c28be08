"""``embferry router``: the HTTP API."""

from __future__ import annotations

from embferry.cli.options import settings_command
from embferry.observe.logs import configure
from embferry.serve.config import Settings


def _run(settings: Settings) -> None:
    """Start the router: the OpenAI-compatible HTTP API."""
    configure(settings.log_level, settings.log_format)
    from embferry.serve.router.server import run

    run(settings)


command = settings_command(("router",), ("", "media", "router"), _run)
