"""A worker as a process: its port, its lease, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp

from embferry.discovery.bootstrap_client import BootstrapClient, LeaseKeeper
from embferry.discovery.leases import Role, Worker
from embferry.observe.logs import set_worker
from embferry.serve.config import Settings
from embferry.serve.http.address import url_of
from embferry.serve.http.connections import ConnectionLimits
from embferry.serve.http.proofs import OPEN_PATHS, Proofs, worker_context
from embferry.serve.http.serving import Report, listen, serve_app
from embferry.serve.http.unproved import Unproved, rates_of
from embferry.serve.security import check_worker
from embferry.serve.worker.errors import error_response
from embferry.serve.worker.service import Service
from embferry.trust.proof_checker import ProofChecker
from embferry.trust.trust import Trust

log = logging.getLogger(__name__)

DRAIN_SECONDS = 3.0
"""Seconds that running requests get to finish when the worker is told to stop; the rest end with an error."""


def open_port(settings: Settings, port: int, flag: str = "--port") -> socket.socket:
    """Returns the worker's listening socket.

    Raises:
        ConfigError: an address of the worker cannot be used.
        TransportError: the port is not available; ``flag`` is the option for another one.
    """
    check_worker(settings)
    return listen(settings.host, port, flag)


def serve_worker(
    app: ASGIApp,
    service: Service[Any, Any, Any],
    listener: socket.socket,
    settings: Settings,
    role: Role,
    endpoint: str,
    report: Report,
) -> None:
    """Serves until SIGINT or SIGTERM, or until the service breaks; then the process ends with status 1.

    On a signal, the worker gives up its lease first, so that routers pass it over. Running requests get
    ``DRAIN_SECONDS`` to finish, the rest end with an error, and everything is closed.
    """
    trust = Trust.of_environment()
    worker = Worker(
        id=f"{role}-{os.getpid()}-{secrets.token_hex(4)}",
        role=role,
        url=url_of(settings.reachable_host, listener, trust.scheme),
        endpoint=endpoint,
        model=settings.model_name,
    )
    set_worker(worker.id)
    keeper = LeaseKeeper(BootstrapClient(settings.bootstrap_url, trust=trust), worker, lambda: service.load)
    app = with_limits(app, service, settings, role)
    if trust.keys is not None:
        checker = ProofChecker(trust.keys, worker_context(worker.id), f"the {role} worker")
        app = Proofs(app, checker, OPEN_PATHS.__contains__)

    def start() -> None:
        keeper.start()
        log.info("%s worker answers at %s", role, worker.url)
        report(worker.url)

    serve_until_stopped(app, service, listener, settings, start, keeper.stop, trust.http_certificate())


def with_limits(app: ASGIApp, service: Service[Any, Any, Any], settings: Settings, role: Role) -> ASGIApp:
    """Returns the application of a worker with limits on requests that prove nothing."""
    return Unproved(app, rates_of(settings.security), f"the {role} worker", error_response, service.metrics)


def serve_until_stopped(
    app: ASGIApp,
    service: Service[Any, Any, Any],
    listener: socket.socket,
    settings: Settings,
    start: Callable[[], None],
    leave: Callable[[], None],
    certificate: ssl.SSLContext | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, or until the service breaks; see :func:`serve_worker`.

    Args:
        app: the application.
        service: the worker; closed at the end.
        listener: closed at the end.
        settings: all of them.
        start: called in the event loop when requests are accepted.
        leave: called on a thread of its own when the end begins; it may block.
        certificate: for TLS.
    """

    async def stop() -> None:
        service.refuse()
        await asyncio.to_thread(leave)
        if service.fault is None and not await asyncio.to_thread(service.wait_idle, DRAIN_SECONDS):
            log.warning("%g unfinished requests are ended", service.load)
        await asyncio.to_thread(service.close)

    try:
        asyncio.run(
            serve_app(
                app,
                listener,
                start,
                stop,
                is_broken=lambda: service.fault is not None,
                limits=ConnectionLimits(settings.max_connections, settings.max_connections_per_address),
                certificate=certificate,
            )
        )
    finally:
        service.close()
        listener.close()
    if service.fault is not None:
        sys.exit(1)
