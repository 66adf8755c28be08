"""The ``mooncake`` transport: one-sided writes of the Mooncake Transfer Engine, from the tensor into the blocks.

The receiver has one engine and a side channel (:mod:`channel`); the handle names both. A sender has an engine and a
connection for each receiver, so that ending a link ends its transfers. :mod:`access` is how revocation is made
true although the engine cannot revoke; :mod:`engine` is what is known of the engine.

Threads: one that serves the side channels, and on the sending side one a receiver that drives its engine; beside them
the engine's own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import msgspec

from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.protocol.layout import MAX_FIELDS
from embferry.transports.contract import Capabilities, Region
from embferry.transports.handles import TOKEN_BYTES, Host, Port, Token, decode_handle
from embferry.transports.net import address
from embferry.transports.net.connections import LinkedTransport
from embferry.transports.net.listener import listen
from embferry.transports.windows import BlockRows

from .engine import P2P, Engine, EngineSettings
from .flights import Cargo, Flights
from .link import Link
from .server import Server

__all__ = ["MooncakeTransport"]

MAX_BYTES = 1 << 46  # more than any machine's memory; keeps every product below 63 bits
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class MooncakeHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-mooncake-1"):
    segment: Name
    """The receiver's name among engines."""
    protocol: Name
    metadata_server: Name
    host: Host
    port: Port
    """Of the side channel."""
    token: Token
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    rows: Annotated[tuple[tuple[Size, Size], ...], msgspec.Meta(min_length=1, max_length=MAX_FIELDS)]


class MooncakeTransport(LinkedTransport[Server, Link]):
    """
    :param host: the address the side channel listens on. The engine itself listens on all addresses.
    :param port: of the side channel; 0 for any free one. The engine's: ``MC_MIN_RPC_PORT`` to ``MC_MAX_RPC_PORT``.
    :param advertise: the IP address peers connect to, if it is another one than ``host``.
    :param protocol: handed to the engine: ``tcp``, ``rdma``, or what your build has. Both ends use the same.
    :param device: handed to the engine: names of RDMA devices, comma separated; empty: all.
    :param metadata_server: handed to the engine; ``P2PHANDSHAKE``: the engines ask each other. Both ends use the same.
    :param register_sources: register the source memory of each write with the engine; None: unless the protocol is
        ``tcp``, which can do without.
    :param revoke_grace_s: how long a revocation waits for writers before it cuts them off.
    :param connect_timeout_s: how long the receiver may take to answer a connection.
    """

    name = "mooncake"
    capabilities = Capabilities(same_host_only=False, maps_region=True)

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        protocol: str = "tcp",
        device: str = "",
        metadata_server: str = P2P,
        register_sources: bool | None = None,
        revoke_grace_s: float = 0.5,
        connect_timeout_s: float = 5.0,
    ) -> None:
        super().__init__(wake)
        self._host, self._port = host, port
        self._settings = EngineSettings(advertise or host, protocol, device, metadata_server)
        self._register_sources = protocol != "tcp" if register_sources is None else register_sources
        self._revoke_grace_s, self._connect_timeout_s = revoke_grace_s, connect_timeout_s

    def register(self, region: Region) -> bytes:
        """:raises TransportError: the engine is not installed or cannot start, or the port is taken.
        :raises LocalProtocolError: private memory (see :mod:`alias`), or as in the contract."""
        self._check_unregistered()
        if region.fd is None:
            raise LocalProtocolError(
                "the mooncake transport needs memory it can map twice: MultimodalDataBuffers(..., shared=True)"
            )
        advertise = address.advertised(self._settings.host)
        engine = Engine(self._settings)
        token = secrets.token_bytes(TOKEN_BYTES)
        try:
            sock = listen(self._host, self._port)
            try:
                server = Server(region, engine, token, sock, self._revoke_grace_s, self._loop, self._outbox)
            except BaseException:
                sock.close()
                raise
        except BaseException as error:
            engine.close()
            if isinstance(error, OSError):
                raise TransportError(f"cannot map the region again: {error}") from error
            raise
        self._receiving = server
        settings = self._settings
        return msgspec.msgpack.encode(
            MooncakeHandle(
                engine.segment,
                settings.protocol,
                settings.metadata_server,
                advertise,
                server.listener.port,
                token,
                region.num_blocks,
                region.rows,
            )
        )

    def connect(self, handle: bytes) -> None:
        """As in the contract. What goes wrong later, as when the engine cannot start, is reported as ``LinkLost``."""
        peer = decode_handle(handle, MooncakeHandle, self.name)
        _check(peer, self._settings)
        rows, flights = BlockRows(peer.rows, peer.num_blocks), partial(self._open_flights, peer.segment)
        to, timeout_s = (peer.host, peer.port), self._connect_timeout_s
        self._join(
            handle,
            lambda: Link(handle, to, peer.token, rows, timeout_s, flights, self._loop, self._outbox, self._forget),
        )

    def _shut(self, links: Sequence[Link]) -> None:
        """Waits for the engines to end: some milliseconds each, in which the interpreter stands still. If a peer hangs
        in the middle of its engine's first handshake, as long as the engine waits for that (``MC_HANDSHAKE_*``)."""
        for link in links:
            link.end(TransportError("this end was closed"), lost=False)  # a loop that died of a bug has not done it
            link.join()
        if self._receiving is not None:
            self._receiving.close()

    def _open_flights(self, segment: str, on_carried: Callable[[Cargo], None]) -> Flights:
        return Flights(partial(Engine, self._settings), segment, self._register_sources, on_carried)


def _check(peer: MooncakeHandle, ours: EngineSettings) -> None:
    """:raises TransportError: the handle cannot be used here; never worth a retry."""
    address.reachable(peer.host)
    for what, theirs, own in (
        ("protocol", peer.protocol, ours.protocol),
        ("metadata server", peer.metadata_server, ours.metadata_server),
    ):
        if theirs != own:
            raise TransportError(
                f"the receiver's Mooncake engine uses the {what} {theirs!r}, this one {own!r}; configure the same",
                retryable=False,
            )
    end = 0
    for offset, size in peer.rows:
        if size < 1 or offset < end:
            raise TransportError("the handle's fields overlap or are empty; it is damaged", retryable=False)
        end = offset + size * peer.num_blocks
    if end > MAX_BYTES:
        raise TransportError("the handle's region is larger than any memory; it is damaged", retryable=False)
