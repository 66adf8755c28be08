"""A worker on the origin's wire as a process: what the wire asks of the settings, and serving without our router."""

from __future__ import annotations

import logging
import socket
from typing import Any

from starlette.types import ASGIApp

from embferry.discovery.leases import Role
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError
from embferry.serve.http.address import url_of
from embferry.serve.http.serving import Report
from embferry.serve.http.serving import listen as listen_on
from embferry.serve.worker.process import serve_until_stopped, with_limits
from embferry.serve.worker.service import Service
from embferry.trust.policy import is_loopback

log = logging.getLogger(__name__)


def check_origin(settings: Settings) -> None:
    """Checks the settings of a worker on this wire.

    Raises:
        ConfigError: The number format is not the wire's; strangers could reach the worker, or TLS is asked for.
    """
    problems = []
    if settings.dtype != "bf16":
        problems.append(f"--wire origin carries bf16, not {settings.dtype}; set --dtype bf16")
    if not is_loopback(settings.host) and not settings.security.insecure:
        problems.append(
            f"--wire origin would listen on {settings.host}, where strangers can reach it: its peers and callers can"
            " prove nothing, also if there is a cluster key; allow that with --insecure"
        )
    if settings.security.tls_cert is not None:
        problems.append("--wire origin has no TLS; leave out the certificate")
    if problems:
        raise ConfigError(problems)


def listen(settings: Settings, port: int, flag: str) -> socket.socket:
    """Returns the listening socket for the load balancer; ``flag`` is the option for another port."""
    return listen_on(settings.host, port, flag)


def serve(
    app: ASGIApp,
    service: Service[Any, Any, Any],
    listener: socket.socket,
    settings: Settings,
    role: Role,
    report: Report,
) -> None:
    """Serves until SIGINT or SIGTERM, or until the service breaks.

    The worker has no lease, because the load balancer is told of it.
    """
    url = url_of(settings.reachable_host, listener, "http")

    def start() -> None:
        log.info("%s worker answers SGLang's load balancer at %s", role, url)
        report(url)

    app = with_limits(app, service, settings, role)
    serve_until_stopped(app, service, listener, settings, start, lambda: None)
