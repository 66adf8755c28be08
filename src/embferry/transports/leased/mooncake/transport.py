"""The ``mooncake`` transport: one-sided writes of the Mooncake Transfer Engine, from the tensor into the blocks.

The receiver has one engine and a side channel; the handle names both. A sender has an engine and a connection for each
receiver, so that ending a link ends its transfers. :mod:`.engine` is what is known of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import msgspec

from embferry.protocol.errors import TransportError
from embferry.trust import Trust
from embferry.trust.greeting import Channel

from ...contract import Capabilities, Region
from ...handles import Host, Port, Token, decode_handle
from ...net.listener import DEFAULT_LIMITS, ListenLimits
from ...net.stalls import STALL_TIMEOUT_S
from ..transport import LeasedTransport
from .engine import P2P, Engine, EngineSettings
from .receiving_end import MooncakeReceivingEnd
from .write_engine import MooncakeWriteEngine

__all__ = ["MooncakeTransport"]

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class MooncakeHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-mooncake-4"):
    """How a sender reaches the receiver.

    Attributes:
        segment: The receiver's name among engines.
        host: Of the side channel, as is ``port``.
    """

    segment: Name
    protocol: Name
    metadata_server: Name
    host: Host
    port: Port
    token: Token


class MooncakeTransport(LeasedTransport[MooncakeReceivingEnd]):
    """The ``mooncake`` transport, for either end.

    Args:
        host: The address the side channel listens on. The engine itself listens on all addresses.
        port: Of the side channel; 0 for any free one. The engine's: ``MC_MIN_RPC_PORT`` to ``MC_MAX_RPC_PORT``.
        advertise: The IP address peers connect to, if it is another one than ``host``.
        protocol: Handed to the engine: ``tcp``, ``rdma``, or what your build has. Both ends use the same.
        device: Handed to the engine: names of RDMA devices, comma separated; empty: all.
        metadata_server: Handed to the engine; ``P2PHANDSHAKE``: the engines ask each other. Both ends use the same.
        register_sources: Register the source memory of each write with the engine; None: unless the protocol is
            ``tcp``, which can do without.
        revoke_grace_s: How long a revocation waits for writers before it cuts them off.
        connect_timeout_s: How long the receiver may take to answer a connection.
        stall_timeout_s: Seconds without a sign of life from the receiver, while a write is open, until the link is
            lost. The progress of a request inside the engine cannot be seen: the engine's own time limit ends it.
        limits: Of the connections of senders; of these 1024 at most.
        trust: The keys that peers of the side channel must know, and whether strangers may be let in; None: what the
            environment says. The ports that the engine opens are the engine's own.
    """

    name = "mooncake"
    channel = Channel.MOONCAKE
    capabilities = Capabilities(maps_region=True)
    acknowledged = True

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
        stall_timeout_s: float = STALL_TIMEOUT_S,
        limits: ListenLimits = DEFAULT_LIMITS,
        trust: Trust | None = None,
    ) -> None:
        super().__init__(wake, host, port, advertise, connect_timeout_s, stall_timeout_s, limits, trust)
        self._settings = EngineSettings(self._advertise, protocol, device, metadata_server)
        self._register_sources = protocol != "tcp" if register_sources is None else register_sources
        self._revoke_grace_s = revoke_grace_s

    def _connect(self, handle: bytes) -> None:
        """Prepares to write there, as in the contract. An engine that cannot start is reported as ``LinkLost``."""
        peer, ours = decode_handle(handle, MooncakeHandle, self.name), self._settings
        for what in ("protocol", "metadata_server"):
            theirs, own = getattr(peer, what), getattr(ours, what)
            if theirs != own:
                text = f"the receiver's Mooncake engine uses {what} {theirs!r}, this one {own!r}; configure the same"
                raise TransportError(text, retryable=False)
        open_engine = partial(MooncakeWriteEngine, partial(Engine, ours), peer.segment, self._register_sources)
        self._link(handle, peer.host, peer.port, peer.token, open_engine)

    def _receive(self, region: Region) -> MooncakeReceivingEnd:
        return MooncakeReceivingEnd(region, self._settings, self._revoke_grace_s, self._loop, self._outbox)

    def _handle(self, receiving: MooncakeReceivingEnd, host: Host, port: Port, token: Token) -> MooncakeHandle:
        segment, ours = receiving.engine.segment, self._settings
        return MooncakeHandle(segment, ours.protocol, ours.metadata_server, host, port, token)
