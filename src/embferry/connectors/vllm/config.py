"""What stands in ``ec_connector_extra_config``, and the roads that are made from it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import msgspec

from embferry.disaggregation.base.conn_multimodal import Transport
from embferry.disaggregation.protocol.errors import LocalProtocolError
from embferry.disaggregation.protocol.settings import TransferSettings

ROADS = {
    "shm": ("embferry.disaggregation.shm.conn_multimodal", "ShmTransport", False),
    "tcp": ("embferry.disaggregation.tcp.conn_multimodal", "TcpTransport", True),
    "http": ("embferry.disaggregation.http.conn_multimodal", "HttpTransport", True),
    "mooncake": ("embferry.disaggregation.mooncake.conn_multimodal", "MooncakeTransport", True),
    "nixl": ("embferry.disaggregation.nixl.conn_multimodal", "NixlTransport", True),
}
"""Module, class, and whether it takes an address to listen on."""


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
    peer_timeout: float = 1.0
    """Without a word from the producer before a transfer fails."""
    lease_timeout: float = 60.0
    """How long the producer keeps an embedding for a consumer that does not ask."""

    @property
    def sending(self) -> TransferSettings:
        """A producer's: it waits for a consumer that may have much to do before."""
        return TransferSettings(bootstrap_timeout=self.lease_timeout, lease_timeout=self.lease_timeout)

    @property
    def receiving(self) -> TransferSettings:
        """A consumer's: what it asks for is ready, so whoever is silent has ended. One that
        speaks and sends nothing may be busy with others, for a while."""
        patience = self.peer_timeout
        return TransferSettings(
            bootstrap_timeout=patience,
            waiting_timeout=10 * patience,
            transfer_timeout=10 * patience,
            peer_timeout=patience,
            drain_timeout=patience / 2,
            max_peer_losses=1,
        )

    def roads(self) -> list[Transport]:
        """New transports, one for each name.

        :raises TransportError: the engine of one is not installed, or its address cannot be had.
        """
        made: list[Transport] = []
        for name in self.transports:
            module, kind, listens = ROADS[name]
            where = {"host": self.host, "advertise": self.advertise or self.host} if listens else {}
            made.append(getattr(importlib.import_module(module), kind)(**where))
        return made


def parse(extra: Mapping[str, Any]) -> ConnectorConfig:
    """The settings in ``ec_connector_extra_config``.

    :raises LocalProtocolError: a key or a value that cannot be, with what to do about it.
    """
    try:
        config = msgspec.convert(dict(extra), ConnectorConfig)
    except msgspec.ValidationError as error:
        raise LocalProtocolError(f"ec_connector_extra_config: {error}") from None
    unknown = [name for name in config.transports if name not in ROADS]
    if unknown or not config.transports:
        raise LocalProtocolError(f"ec_connector_extra_config: transports are some of {', '.join(ROADS)}, not {unknown}")
    if min(config.num_blocks, config.block_size, config.cache_bytes, config.peer_timeout, config.lease_timeout) <= 0:
        raise LocalProtocolError("ec_connector_extra_config: sizes and times are greater than 0")
    return config
