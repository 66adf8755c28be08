"""What stands in ``ec_connector_extra_config``, and the transports that are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.settings import TransferSettings
from embferry.transports.contract import Transport
from embferry.transports.registry import TRANSPORTS

MAX_BAD_CHUNKS = 4
"""In a row. With the pauses between them that is a second; longer than that nobody waits for one producer."""


class ConnectorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every key of ``ec_connector_extra_config``. Times are seconds, sizes bytes unless they say otherwise."""

    transports: tuple[str, ...] = ("shm", "tcp")
    """The preferred one first."""
    host: str = "127.0.0.1"
    """The address to listen on."""
    advertise: str | None = None
    """What the other side is told, if it differs."""
    num_blocks: int = 1024
    """Of the consumer's pool; an embedding may be larger than the pool."""
    block_size: int = 16
    """Tokens a block."""
    cache_bytes: int = 256 << 20
    """Embeddings that are kept beyond their use, on either side: on the producer to be sent again, on the consumer for
    the next request with the same content."""
    offered_bytes: int = 1 << 30
    """Producer: embeddings that are promised and have not been fetched; beyond that nothing new is promised."""
    peer_timeout: float = 1.0
    """Without a word from the producer before it counts as lost."""
    lease_timeout: float = 60.0
    """How long the producer keeps an embedding for a consumer that does not ask."""
    router: str | None = None
    """Consumer: base URL of the router, which is asked for another producer and told of failures."""
    failover_timeout: float = 5.0
    """Consumer: how long the router may take to have an embedding made again elsewhere."""
    encode_on_failure: bool = False
    """Consumer: an embedding that cannot be had is encoded here, if the request has its pixels."""
    metrics_port: int | None = None
    """Where Prometheus finds this connector's numbers, at ``host``; of a data-parallel engine's rank r, this plus r."""

    @property
    def sending(self) -> TransferSettings:
        """A producer's: it waits for a consumer that may have much to do before."""
        return TransferSettings(bootstrap_timeout=self.lease_timeout, lease_timeout=self.lease_timeout)

    @property
    def receiving(self) -> TransferSettings:
        """A consumer's: what it asks for is ready, so whoever is silent has ended. One that
        speaks and sends nothing may be busy with others, for a while."""
        retry_policy = self.peer_timeout
        return TransferSettings(
            bootstrap_timeout=retry_policy,
            waiting_timeout=10 * retry_policy,
            transfer_timeout=10 * retry_policy,
            peer_timeout=retry_policy,
            drain_timeout=retry_policy / 2,
            max_peer_losses=1,
            max_bad_chunks=MAX_BAD_CHUNKS,
        )

    def make_transports(self) -> list[Transport]:
        """New transports, one for each name.

        :raises TransportError: the engine of one is not installed, or its address cannot be had.
        """
        made: list[Transport] = []
        for name in self.transports:
            spec = TRANSPORTS[name]
            where: dict[str, Any] = (
                {"host": self.host, "advertise": self.advertise or self.host} if spec.listens else {}
            )
            make = spec.load()
            made.append(make(**where))
        return made


POSITIVE = (
    "num_blocks",
    "block_size",
    "cache_bytes",
    "offered_bytes",
    "peer_timeout",
    "lease_timeout",
    "failover_timeout",
)


def parse(extra: Mapping[str, Any]) -> ConnectorConfig:
    """The settings in ``ec_connector_extra_config``.

    :raises LocalProtocolError: a key or a value that cannot be, with what to do about it.
    """
    try:
        config = msgspec.convert(dict(extra), ConnectorConfig)
    except msgspec.ValidationError as error:
        raise _wrong(str(error)) from None
    unknown = [name for name in config.transports if name not in TRANSPORTS]
    if unknown or not config.transports:
        raise _wrong(f"transports are some of {', '.join(TRANSPORTS)}, not {unknown}")
    for name in POSITIVE:
        if not getattr(config, name) > 0:
            raise _wrong(f"{name} is greater than 0")
    if config.metrics_port is not None and not 0 <= config.metrics_port < 65536:
        raise _wrong(f"metrics_port is a port, or 0 for any, not {config.metrics_port}")
    if config.router is not None:
        check_router(config.router)
    return config


def check_router(url: str) -> tuple[str, int]:
    """Host and port of a router's base URL.

    :raises LocalProtocolError: it is not one.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:
        raise _wrong(f"router cannot be read: {error}") from None
    rest = (parts.path.strip("/"), parts.query, parts.fragment, parts.username)
    if parts.scheme != "http" or not parts.hostname or any(rest):
        raise _wrong(f"router is like http://10.0.0.1:8000, not {url!r}")
    return parts.hostname, port


def _wrong(why: str) -> LocalProtocolError:
    return LocalProtocolError(f"ec_connector_extra_config: {why}")
