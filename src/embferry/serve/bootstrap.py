"""The bootstrap server of a cluster, as the settings describe it."""

from __future__ import annotations

from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.http_server import ServerLimits
from embferry.serve.config import Settings


def bootstrap_server(settings: Settings) -> BootstrapServer:
    """Returns the server, not started yet."""
    own = settings.bootstrap
    limits = ServerLimits(own.request_timeout, own.max_connections, own.connections_per_address)
    return BootstrapServer(settings.host, own.port, lease_seconds=own.lease, limits=limits)
