"""The bootstrap server of a cluster, as the settings describe it."""

from __future__ import annotations

import signal

from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.server_limits import ServerLimits
from embferry.protocol.errors import TransportError
from embferry.serve.config import Settings
from embferry.serve.end_signals import EndSignals
from embferry.serve.security import check_part


class _BootstrapServer(BootstrapServer):
    """Names the option of the command line when the port is taken."""

    port_place = ""

    def start(self) -> None:
        try:
            super().start()
        except TransportError as error:
            raise TransportError(f"{error.detail}: {self.port_place}", retryable=False) from error


def bootstrap_server(settings: Settings, *, unproved_ranks: bool = False) -> BootstrapServer:
    """Returns the server, not started yet. ``unproved_ranks``: accept SGLang's in any case.

    Raises:
        ConfigError: Strangers could reach it, and there is no cluster key.
    """
    check_part(settings, "the bootstrap server")
    own = settings.bootstrap
    limits = ServerLimits(
        own.request_timeout,
        own.max_connections,
        own.connections_per_address,
        settings.security.unproved_requests_per_second,
        settings.security.unproved_bytes_per_second,
    )
    server = _BootstrapServer(
        settings.host,
        own.port,
        lease_seconds=own.lease,
        limits=limits,
        unproved_ranks=unproved_ranks or own.unproved_ranks,
    )
    server.port_place = settings.place("bootstrap", "port")
    return server


def run(settings: Settings) -> None:
    """Serves until SIGTERM. Ctrl-C raises ``KeyboardInterrupt``. Call it on the main thread.

    Raises:
        ConfigError: Strangers could reach it, and there is no cluster key.
        TransportError: The address cannot be bound.
    """
    with EndSignals((signal.SIGTERM,)) as signals, bootstrap_server(settings):
        signals.wait()
