"""``embferry router``: a router as a process."""

from __future__ import annotations

import asyncio
import logging

from embferry.serve.config import Settings
from embferry.serve.http.address import url_of
from embferry.serve.http.app import RouterApp
from embferry.serve.http.backends import DESCRIPTORS
from embferry.serve.http.connections import ConnectionLimits
from embferry.serve.http.serving import Report, listen, serve_app, unreported
from embferry.serve.security import check_router
from embferry.trust.trust import Trust

log = logging.getLogger(__name__)

DRAIN_SECONDS = 4
"""Seconds that answers get to finish on a signal: more than workers have, so that their last events arrive."""


def run(settings: Settings, report: Report = unreported) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        ConfigError: strangers can reach the host, and there is no API key.
        TransportError: the port is not available.
        ApiKeysError: the API keys cannot be read.
    """
    check_router(settings)
    for folder in settings.media.allowed_folders:
        if not folder.is_dir():  # it may be mounted later
            log.warning("%s: %s is not a folder on this machine", settings.place("media", "allowed_folders"), folder)
    with listen(settings.host, settings.router.port, settings.place("router", "port")) as listener:
        trust = Trust.of_environment()
        trust.check_host(settings.reachable_host, "the router")
        url = url_of(settings.reachable_host, listener, trust.scheme)

        def start() -> None:
            log.info("router listens on %s", url)
            report(url)

        app = _application(settings)
        limits = ConnectionLimits(
            settings.max_connections, settings.max_connections_per_address, app.own_addresses.__contains__
        )
        certificate = trust.http_certificate(clients=False)
        asyncio.run(
            serve_app(
                app,
                listener,
                start,
                app.stop,
                close_seconds=DRAIN_SECONDS,
                limits=limits,
                share=DESCRIPTORS,
                certificate=certificate,
                behind_proxy=True,
            )
        )


def _application(settings: Settings) -> RouterApp:
    """Imports only the router that runs: this one decodes media, the one before vLLM does not."""
    if settings.router.engine == "vllm":
        from embferry.serve.vllm import app as before_vllm

        return before_vllm.build(settings)
    from embferry.serve.router import app as before_workers

    return before_workers.build(settings)
