"""``embferry router``: the application behind uvicorn."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

import uvicorn

from embferry.serve.config import Settings
from embferry.serve.router.app import build

log = logging.getLogger(__name__)

BACKLOG = 2048
STOP_SECONDS = 5
"""Seconds answers under way get to finish when the router is told to stop."""


def run(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM. Exits with status 1 if the port cannot be had."""
    try:
        listener = listen(settings.host, settings.router.port)
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"embferry: cannot listen on {settings.host}:{settings.router.port}: {reason}", file=sys.stderr)
        sys.exit(1)
    log.info("router listens on http://%s:%d", settings.reachable_host, listener.getsockname()[1])
    config = uvicorn.Config(
        build(settings), log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=STOP_SECONDS
    )
    with listener:
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening TCP socket; port 0 takes a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
