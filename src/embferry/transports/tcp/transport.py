"""The ``tcp`` transport: scatter/gather from the source tensor, received straight into the blocks, on any network.

The receiver listens. A handle is its address and a random token. Both ends greet (:mod:`embferry.trust.greeting`), then
the sender must send the token: so a receiver that does not know the cluster key never sees it. Each handle has one
connection, and each transport one thread, which serves all of its connections: :mod:`receive_server` receives,
:mod:`send_link` sends, :mod:`framing` is the format.

``connect`` does not wait: it raises a refusal that the kernel knows at once; any other is reported as
:class:`LinkLost`. Socket buffers are left to the kernel, which tunes them up to ``net.ipv4.tcp_rmem`` and ``tcp_wmem``;
setting their size would turn that off.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from embferry.trust import Trust
from embferry.trust.greeting import Channel, Role

from ..contract import Capabilities, Region
from ..handles import TOKEN_BYTES, Host, Port, Token, decode_handle
from ..net import address
from ..net.connections import LinkedTransport
from ..net.listener import DEFAULT_LIMITS, Listener, ListenLimits, listen
from ..net.stalls import STALL_TIMEOUT_S, check_stall_timeout, progress_interval
from .receive_server import ReceiveServer, SenderConnection
from .send_link import SendLink

__all__ = ["TcpTransport"]


class TcpHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-tcp-3"):
    host: Host
    port: Port
    token: Token
    tls: bool = False
    """Whether the receiver accepts no connection without TLS."""


class TcpTransport(LinkedTransport[ReceiveServer, SendLink]):
    """A transport over TCP connections from senders to the receiver.

    Args:
        wake: Called on any thread when :meth:`poll` has events.
        host: The address to listen on; ``0.0.0.0`` is all of IPv4, ``::`` all of IPv6.
        port: 0 for any that is free.
        advertise: The IP address that peers connect to, if it is not ``host``.
        connect_timeout_s: Seconds the receiver may take to accept a connection.
        stall_timeout_s: Seconds without an acknowledgement of bytes under way until the link is lost. The receiver
            acknowledges five times in this time, or once a second, as long as anything arrives.
        limits: Bounds on the connections of senders.
        trust: The keys that peers must know, whether strangers may be let in, and the certificate; None: what the
            environment says.
    """

    name = "tcp"
    capabilities = Capabilities()

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        connect_timeout_s: float = 5.0,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        limits: ListenLimits = DEFAULT_LIMITS,
        trust: Trust | None = None,
    ) -> None:
        self._trust = Trust.or_environment(trust)
        self._stall_timeout_s = check_stall_timeout(stall_timeout_s)
        super().__init__(wake)
        self._host, self._port, self._advertise = host, port, advertise or host
        self._connect_timeout_s, self._limits = connect_timeout_s, limits

    def register(self, region: Region) -> bytes:
        self._check_unregistered()
        advertise, own = address.advertised(self._advertise), address.own(self._host)
        self._trust.check_listening(str(own), "the port of the tcp transport")
        self._trust.check_host(advertise, "the port of the tcp transport")
        sock, greet = listen(self._host, self._port), partial(self._trust.greeting, Role.ACCEPTOR, Channel.TCP)
        token, progress_s = secrets.token_bytes(TOKEN_BYTES), progress_interval(self._stall_timeout_s)
        try:
            server = ReceiveServer(
                region, token, sock, self._loop, self._outbox, self._limits, progress_s, greet, self._trust.tls
            )
        except BaseException:
            sock.close()
            raise
        self._receiving = server
        return msgspec.msgpack.encode(TcpHandle(advertise, server.listener.port, server.token, self._trust.demands_tls))

    def _connect(self, handle: bytes) -> None:
        peer = decode_handle(handle, TcpHandle, self.name)
        to, times = (address.reachable(peer.host), peer.port), (self._connect_timeout_s, self._stall_timeout_s)
        on_end, greet = partial(self._over, handle), partial(self._trust.greeting, Role.DIALER, Channel.TCP)
        tls = self._trust.tls_for(peer.tls)
        self._join(handle, lambda: SendLink(to, peer.token, *times, self._loop, self._outbox, on_end, greet, tls))

    def _listener(self) -> Listener[SenderConnection] | None:
        return None if self._receiving is None else self._receiving.listener

    def _shut(self, links: Sequence[SendLink]) -> None:
        if self._receiving is not None:
            self._receiving.close()
            self._loop.call(self._receiving.stop)
