"""The ``nixl`` transport: one-sided writes by NIXL, with UCX or any other backend, straight into the blocks.

The handle is the address of the side channel and a random token. A sender is given the metadata of an agent that
serves it alone when it has connected, because that is too large for a handle. NIXL's notifications are not used: the
connection that reveals the death of a peer has to be there anyway, and its messages arrive without polling.

Only host memory is read and written. What UCX uses is set in the environment of the process (``UCX_TLS``,
``UCX_NET_DEVICES``; ``NIXL_LOG_LEVEL``, ``UCX_LOG_LEVEL``); nothing of it is changed here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec

from embferry.protocol.errors import LocalProtocolError
from embferry.trust import Trust
from embferry.trust.greeting import Channel

from ...contract import Capabilities, Region
from ...handles import Host, Port, Token, decode_handle
from ...net.listener import DEFAULT_LIMITS, ListenLimits
from ...net.stalls import STALL_TIMEOUT_S
from ..sending_end import END_MARGIN_S
from ..transport import LeasedTransport
from .agent import Backends, WritingAgent, binding
from .receiving_end import NixlReceivingEnd

__all__ = ["NixlTransport"]


class NixlHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-nixl-3"):
    host: Host
    port: Port
    token: Token


class NixlTransport(LeasedTransport[NixlReceivingEnd]):
    """The ``nixl`` transport, for either end.

    Args:
        backends: NIXL's backends by name, each with its parameters as NIXL takes them (strings); UCX if None. Both ends
            must have one in common.
        host: The address to listen on for senders; all of IPv4 is ``0.0.0.0``, all of IPv6 ``::``.
        port: 0 for any that is free.
        advertise: The IP address peers connect to, if it is another one than ``host``.
        connect_timeout_s: How long the receiver may take to answer a connection, its new agent included.
        stall_timeout_s: Seconds without a sign of life from the receiver, while a write is open, until the link is
            lost. The progress of a request inside the engine cannot be seen: UCX's own time-outs end it.
        limits: Of the connections of senders; of these 256 at most.
        drain_timeout_s: How long writes in flight may take to end when a link ends; then the agent is destroyed.
        close_timeout_s: How long :meth:`close` waits for senders to end their writes into the own region. One on this
            host that has not ended them by then may go on, because its process is stopped: everything is closed and
            ``TransportError`` raised; give the region up rather than use it again.
        slice_bytes: The largest request given to the engine. On shared memory it is copied in one go, so this bounds
            how long a revocation and other writes wait.
        trust: The keys that peers of the side channel must know, and whether strangers may be let in; None: what the
            environment says. The ports that UCX opens are UCX's own.

    Raises:
        TransportError: NIXL is not installed; not worth a retry.
    """

    name = "nixl"
    channel = Channel.NIXL
    capabilities = Capabilities()

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        *,
        backends: Backends | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        connect_timeout_s: float = 10.0,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        limits: ListenLimits = DEFAULT_LIMITS,
        drain_timeout_s: float = 5.0,
        close_timeout_s: float = 5.0,
        slice_bytes: int = 16 << 20,
        trust: Trust | None = None,
    ) -> None:
        binding()
        limit = drain_timeout_s + END_MARGIN_S
        super().__init__(wake, host, port, advertise, connect_timeout_s, stall_timeout_s, limits, trust, limit)
        self._backends = {"UCX": {}} if backends is None else backends
        if not self._backends or slice_bytes < 1:
            raise LocalProtocolError("the nixl transport needs a backend, and slices of at least one byte")
        self._open_agent = partial(WritingAgent, self._backends, slice_bytes, drain_timeout_s)
        self._close_timeout_s = close_timeout_s

    def _connect(self, handle: bytes) -> None:
        peer = decode_handle(handle, NixlHandle, self.name)
        self._link(handle, peer.host, peer.port, peer.token, self._open_agent)

    def _receive(self, region: Region) -> NixlReceivingEnd:
        return NixlReceivingEnd(region, self._backends, self._close_timeout_s, self._loop, self._outbox)

    def _handle(self, receiving: NixlReceivingEnd, host: Host, port: Port, token: Token) -> NixlHandle:
        return NixlHandle(host, port, token)
