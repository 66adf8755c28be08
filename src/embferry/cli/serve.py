"""``embferry serve``: everything on one machine."""

from __future__ import annotations

from embferry.cli.options import settings_command
from embferry.cli.workers import checked_model
from embferry.serve.config import SECTIONS, Settings


def _run(settings: Settings) -> None:
    """Start everything on this machine.

    Bootstrap server, encode and language workers and the router, as processes that are started again when they die.
    """
    checked_model(settings)
    from embferry.serve.supervisor import run

    run(settings)


command = settings_command(("serve", "router"), ("", *SECTIONS), _run)
