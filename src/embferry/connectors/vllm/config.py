"""The settings in ``ec_connector_extra_config``, and the transports that they name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from embferry import LocalProtocolError, TransferSettings, Transport, Trust
from embferry.cache import address
from embferry.memory.limits import default_max_embedding_bytes

from ..shared.transports import check_names, make_transports

MAX_KEPT = 512
"""Embeddings kept by a producer or a consumer, at most: each holds a file descriptor."""
MAX_BAD_CHUNKS = 4
"""Damaged chunks in a row before a producer counts as lost: about one second with the pauses in between."""

Count = Annotated[int, msgspec.Meta(gt=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
CollectorUrl = Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?\Z")]


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cache that encoders share.

    Attributes:
        url: ``file:///path`` of a folder, or ``mooncake://host:port`` of a master.
        max_bytes: Bound on the bytes of the folder. Mooncake has bounds of its own.
        lookup_timeout: How long a request waits for a lookup.
    """

    url: str
    max_bytes: Count = 10 << 30
    lookup_timeout: Seconds = 1.0


class ConnectorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every key of ``ec_connector_extra_config``. Times are seconds, sizes are bytes unless stated otherwise.

    Attributes:
        transports: Names of the transports, the preferred one first.
        host: The address to listen on.
        advertise: The address that the other side is told, if it differs from ``host``.
        num_blocks: Consumer: blocks in the pool. An embedding may be larger than the pool.
        block_size: Consumer: tokens per block.
        cache_bytes: Embeddings kept beyond their use: by a producer to be sent again, by a consumer for later requests
            with the same content.
        max_embedding_bytes: The largest embedding that is accepted. A consumer refuses a larger one before it asks for
            memory.
        offered_bytes: Producer: embeddings that are offered and not fetched; beyond that, new offers are refused.
        max_offers: Producer: offers that are not fetched, and consumers that are fetching, at most a quarter of the
            files that the process may open.
        claim_timeout: Producer: how long an offer for which no consumer asks is kept in any case; after that it gives
            way to new ones when ``offered_bytes`` or ``max_offers`` is reached.
        peer_timeout: Consumer: time without a message from the producer after which it counts as lost.
        lease_timeout: Producer: how long it keeps an embedding for a consumer that sends no message.
        router: Consumer: base URL of the router, which names other producers and is told of failures.
        failover_timeout: Consumer: how long the router may take to have an embedding encoded elsewhere.
        encode_on_failure: Consumer: whether it encodes an item itself if the embedding cannot be obtained and the
            request has its pixels.
        cluster_key_file: The file of the cluster key, which both sides must know; None: as the environment says
            (``EMBFERRY_CLUSTER_KEY_FILE`` or ``EMBFERRY_CLUSTER_KEY``).
        insecure: Whether ``host`` may be an address that strangers can reach although there is no cluster key.
        cache: Producer: the cache that encoders share; None for none.
        metrics_port: Port of the Prometheus endpoint at ``host``, 0 for any. Rank r of a data-parallel engine adds r.
        ranks_port: Engines with ranks on several hosts: the port at the scheduler's ``host`` from which the other hosts
            fetch embeddings. They reach it at vLLM's ``master_addr``.
        traces_endpoint: Consumer: URL of a collector for OTLP over HTTP, which gets a span of each transfer; None for
            none. vLLM tells of the trace of a request only with `--otlp-traces-endpoint`.
    """

    transports: tuple[str, ...] = ("shm", "tcp")
    host: str = "127.0.0.1"
    advertise: str | None = None
    num_blocks: Count = 1024
    block_size: Count = 16
    cache_bytes: Count = 256 << 20
    max_embedding_bytes: Count = msgspec.field(default_factory=default_max_embedding_bytes)
    offered_bytes: Count = 1 << 30
    max_offers: Count = 4096
    peer_timeout: Seconds = 1.0
    lease_timeout: Seconds = 60.0
    claim_timeout: Seconds = 10.0
    router: str | None = None
    failover_timeout: Seconds = 5.0
    encode_on_failure: bool = True
    cluster_key_file: str | None = None
    insecure: bool = False
    cache: CacheConfig | None = None
    metrics_port: Port | None = None
    ranks_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    traces_endpoint: CollectorUrl | None = None

    @property
    def trust(self) -> Trust:
        """The cluster key, and whether strangers may be let in.

        Raises:
            LocalProtocolError: The key file cannot be used.
        """
        return Trust.of_environment(key_file=self.cluster_key_file, insecure=self.insecure)

    @property
    def sending(self) -> TransferSettings:
        """Settings of a producer. It waits for a consumer that may be busy with other requests first."""
        return TransferSettings(bootstrap_timeout=self.lease_timeout, lease_timeout=self.lease_timeout)

    @property
    def receiving(self) -> TransferSettings:
        """Settings of a consumer. The embedding is encoded already, so a producer that sends no message is gone.

        A producer that sends messages but no data may be busy with other consumers for a while.
        """
        return TransferSettings(
            bootstrap_timeout=self.peer_timeout,
            waiting_timeout=10 * self.peer_timeout,
            transfer_timeout=10 * self.peer_timeout,
            answer_timeout=self.peer_timeout,
            peer_timeout=self.peer_timeout,
            drain_timeout=self.peer_timeout / 2,
            max_peer_losses=1,
            max_bad_chunks=MAX_BAD_CHUNKS,
            max_embedding_bytes=self.max_embedding_bytes,
        )

    def make_transports(self) -> list[Transport]:
        """Returns new transports, one for each name.

        Raises:
            TransportError: The engine of a transport is not installed, or its address is not available.
        """
        return make_transports(self.transports, self.host, self.advertise, self.trust)


def parse(extra: Mapping[str, Any]) -> ConnectorConfig:
    """Returns the settings.

    Raises:
        LocalProtocolError: A setting is unknown or not allowed, or strangers can reach ``host`` and there is no key.
    """
    try:
        config = msgspec.convert(dict(extra), ConnectorConfig)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    check_names(config.transports, "ec_connector_extra_config: transports")
    if config.router is not None:
        router_address(config.router)
    if config.cache is not None:
        try:
            address.parse(config.cache.url)
        except LocalProtocolError as error:
            raise _invalid(f"cache: {error.detail}") from None
    config.trust.check_listening(config.host, "the connector")  # now, and not with the first request
    return config


def router_address(url: str) -> tuple[str, int]:
    """Returns host and port of a router's base URL. Raises LocalProtocolError if it is not such a URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise _invalid(f"router cannot be read: {error}") from None
    rest = (parts.path.strip("/"), parts.query, parts.fragment, parts.username)
    if parts.scheme not in ("http", "https") or not parts.hostname or any(rest):
        raise _invalid(f"router is like http://10.0.0.1:8000, not {url!r}")
    return parts.hostname, port


def _invalid(why: str) -> LocalProtocolError:
    return LocalProtocolError(f"ec_connector_extra_config: {why}")
