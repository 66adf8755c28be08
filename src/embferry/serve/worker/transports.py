"""From names to the transports themselves: which ones a worker has, and in which order."""

from __future__ import annotations

import ipaddress
import logging
import sys
from typing import Any

from embferry.protocol.errors import TransportError
from embferry.serve.config import Settings
from embferry.serve.config_transports import AUTO, SAME_HOST
from embferry.serve.worker.address import address_of
from embferry.transports.contract import Transport
from embferry.transports.registry import TRANSPORTS

log = logging.getLogger(__name__)


def make_transports(settings: Settings) -> list[Transport]:
    """One transport for each transport of ``transfer.transports``, the preferred one first. Ends the process with status 2
    and what to install if one that is named cannot be had.

    :raises OSError: a host name has no address.
    """
    found = _automatic(settings) if settings.transfer.transports == (AUTO,) else _named(settings)
    log.info("transports: %s", ", ".join(transport.name for transport in found))
    return found


def unusable(settings: Settings) -> list[str]:
    """One sentence for each transport that is named in the settings and cannot be had on this machine."""
    problems = []
    for name in settings.transfer.transports:
        try:
            if name != AUTO:
                make(name, settings).close()
        except TransportError as error:
            problems.append(_problem(name, error))
    return problems


def make(name: str, settings: Settings) -> Transport:
    """One transport, seen to work as far as one end can see.

    :raises TransportError: its engine is not installed, or cannot start as it is set up.
    """
    kind = TRANSPORTS[name]
    arguments: dict[str, Any] = {}
    if kind.listens:
        arguments |= {"host": address_of(settings.host), "advertise": address_of(settings.reachable_host)}
    for key, value in settings.transfer:
        if key.startswith(f"{name}_") and value is not None:
            arguments[key.removeprefix(f"{name}_")] = value  # mooncake_protocol: protocol of the mooncake transport
    if name == "mooncake":
        _try_mooncake(settings)
    return kind.load()(**arguments)


def _named(settings: Settings) -> list[Transport]:
    made: list[Transport] = []
    for name in settings.transfer.transports:
        try:
            made.append(make(name, settings))
        except TransportError as error:
            print(f"embferry: {_problem(name, error)}", file=sys.stderr)
            sys.exit(2)
    return made


def _automatic(settings: Settings) -> list[Transport]:
    """Where a worker is reached by the loopback address, all its peers are on this host: no engine is of use, and none
    listens."""
    if ipaddress.ip_address(address_of(settings.reachable_host)).is_loopback:
        return [make(name, settings) for name in SAME_HOST]
    made: list[Transport] = []
    for name in TRANSPORTS:
        try:
            made.append(make(name, settings))
        except TransportError as error:
            log.info("the transport %s is left out: %s", name, error)
    return made


def _try_mooncake(settings: Settings) -> None:
    """The transport makes its engine when it is first needed, which for a sender is in the middle of a request. One is
    made now, and ended: some 50 ms."""
    from embferry.transports.leased.mooncake.engine import Engine, EngineSettings  # here: only who uses it needs it

    transfer = settings.transfer
    protocol, device, server = transfer.mooncake_protocol, transfer.mooncake_device, transfer.mooncake_metadata_server
    Engine(EngineSettings(address_of(settings.reachable_host), protocol, device, server)).close()


def _problem(name: str, error: TransportError) -> str:
    return f"transfer.transports: {name}: {error}"
