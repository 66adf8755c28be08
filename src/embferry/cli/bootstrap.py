"""``embferry bootstrap``: the bootstrap server."""

from __future__ import annotations

from embferry.cli.options import fail, settings_command
from embferry.observe.logs import configure
from embferry.serve.config import Settings


def _run(settings: Settings) -> None:
    """Start the bootstrap server, where workers register and routers find them."""
    configure(settings.log_level, settings.log_format)
    from embferry.discovery.bootstrap_server import run
    from embferry.protocol.errors import TransportError

    try:
        run(settings.host, settings.bootstrap.port, settings.bootstrap.lease)
    except TransportError as error:
        fail(error.detail, status=1)


command = settings_command(("bootstrap",), ("", "bootstrap"), _run)
