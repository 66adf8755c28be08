"""Creates the transports of a worker from its settings."""

from __future__ import annotations

import inspect
import ipaddress
import logging
from typing import Any

from embferry.protocol.errors import TransportError
from embferry.serve.config import AUTO, SAME_HOST, Settings
from embferry.serve.config_load import ConfigError
from embferry.serve.http.address import address_of
from embferry.transports.contract import Transport
from embferry.transports.net.listener import ListenLimits
from embferry.transports.registry import TRANSPORTS
from embferry.trust.trust import Trust

log = logging.getLogger(__name__)


def make_transports(settings: Settings) -> list[Transport]:
    """Creates the transports of the setting ``transfer.transports``, the preferred one first.

    Raises:
        ConfigError: a transport that must work does not; says what to install.
        OSError: a host name has no address.
    """
    names, optional = settings.transfer.transports, False
    if names == (AUTO,):
        # A worker with a loopback address has all its peers on this host. It needs no engine, and none must listen.
        same_host = ipaddress.ip_address(address_of(settings.reachable_host)).is_loopback
        names, optional = (SAME_HOST, False) if same_host else (tuple(TRANSPORTS), True)
    names = _encrypted(names, chosen=not optional)
    made: list[Transport] = []
    for name in names:
        try:
            made.append(make(name, settings))
        except TransportError as error:
            if not optional:
                raise ConfigError([_problem(settings, name, error)]) from error
            log.info("transport %s is not available: %s", name, error)
    level = logging.INFO if optional else logging.DEBUG  # a fixed choice is no news
    log.log(level, "transports: %s", ", ".join(transport.name for transport in made))
    return made


def _encrypted(names: tuple[str, ...], *, chosen: bool) -> tuple[str, ...]:
    """Returns the transports to use where TLS is required: an engine encrypts nothing, so it has to be asked for."""
    bare = [name for name in names if TRANSPORTS[name].needs_engine]
    if not bare or not Trust.of_environment().demands_tls:
        return names
    if chosen:
        log.warning("TLS is required, and %s sends embeddings without encryption", " and ".join(bare))
        return names
    return tuple(name for name in names if name not in bare)


def unusable(settings: Settings) -> list[str]:
    """Returns one sentence for each transport that the settings name and that does not work on this machine."""
    problems = []
    for name in settings.transfer.transports:
        try:
            if name != AUTO:
                make(name, settings).close()
        except TransportError as error:
            problems.append(_problem(settings, name, error))
    return problems


def make(name: str, settings: Settings) -> Transport:
    """Creates one transport, after a trial of its engine.

    Raises:
        TransportError: the engine is not installed, or cannot start with these settings.
    """
    spec = TRANSPORTS[name]
    arguments: dict[str, Any] = {}
    if spec.listens:
        arguments |= {"host": address_of(settings.host), "advertise": address_of(settings.reachable_host)}
    for key, value in settings.transfer:
        if key.startswith(f"{name}_") and value is not None:
            arguments[key.removeprefix(f"{name}_")] = value  # mooncake_protocol is mooncake's argument "protocol"
    if name == "mooncake":
        _try_mooncake(settings)
    kind, most = spec.load(), settings.transfer.max_connections
    common: dict[str, Any] = {
        "stall_timeout_s": settings.transfer.stall_timeout,
        "limits": ListenLimits(connections=most, connections_per_address=max(1, most // 4)),
    }
    taken = inspect.signature(kind).parameters  # a transport of one's own may know nothing of these
    return kind(**arguments, **{key: value for key, value in common.items() if key in taken})


def _try_mooncake(settings: Settings) -> None:
    """Starts and ends an engine, about 50 ms.

    The transport starts its own engine on first use, which for a sender is in the middle of a request.
    """
    from embferry.transports.leased.mooncake.engine import Engine, EngineSettings  # here: mooncake is optional

    transfer = settings.transfer
    protocol, device, server = transfer.mooncake_protocol, transfer.mooncake_device, transfer.mooncake_metadata_server
    Engine(EngineSettings(address_of(settings.reachable_host), protocol, device, server)).close()


def _problem(settings: Settings, name: str, error: TransportError) -> str:
    return f"{settings.place('transfer', 'transports')}: {name}: {error}"
