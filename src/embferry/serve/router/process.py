"""``embferry router``: a router as a process."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp

from embferry.serve.config import Settings
from embferry.serve.http.serving import Report, listen, serve_app, unreported
from embferry.serve.security import check_router
from embferry.serve.worker.address import url_of

log = logging.getLogger(__name__)

DRAIN_SECONDS = 4
"""Seconds that answers get to finish on a signal: more than workers have, so that their last events arrive."""


def run(settings: Settings, report: Report = unreported) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        ConfigError: strangers can reach the host, and there is no API key.
        TransportError: the port is not available.
    """
    check_router(settings)
    with listen(settings.host, settings.router.port) as listener:
        url = url_of(settings.reachable_host, listener)

        def start() -> None:
            log.info("router listens on %s", url)
            report(url)

        app, most = _application(settings), settings.max_connections
        asyncio.run(serve_app(app, listener, start, close_seconds=DRAIN_SECONDS, max_connections=most))


def _application(settings: Settings) -> ASGIApp:
    """Imports only the router that runs: this one decodes media, the one before vLLM does not."""
    if settings.router.engine == "vllm":
        from embferry.serve.vllm import app as before_vllm

        return before_vllm.build(settings)
    from embferry.serve.router import app as before_workers

    return before_workers.build(settings)
