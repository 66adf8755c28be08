"""``embferry router --engine vllm``: the application behind uvicorn."""

from __future__ import annotations

import asyncio
import logging

from embferry.serve.config import Settings
from embferry.serve.vllm.app import build
from embferry.serve.worker.address import url_of
from embferry.serve.worker.process import Report, Started, listen, serve_app, unreported

log = logging.getLogger(__name__)

GRACE_SECONDS = 4
"""Seconds answers under way get to finish."""


def run(settings: Settings, report: Report = unreported) -> None:
    """Serves until SIGINT or SIGTERM. Ends the process with status 1 if the port cannot be had."""
    with listen(settings.host, settings.router.port) as listener:
        url = url_of(settings.reachable_host, listener)

        def begin() -> None:
            log.info("router listens on %s", url)
            report(Started(url))

        async def end() -> None:
            """Answers under way may finish; then uvicorn ends them."""

        asyncio.run(serve_app(build(settings), listener, begin, end, grace=GRACE_SECONDS))
