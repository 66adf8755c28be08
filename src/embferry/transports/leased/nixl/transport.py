"""The ``nixl`` transport: one-sided writes by NIXL, with UCX or any other backend, straight into the blocks.

A handle is the address of the receiver and a random token. A sender connects there, is given the metadata of an agent
(too large for a handle, and for it alone), and asks before each write; :mod:`gate` says why, :mod:`messages` what is
said, :mod:`server` receives, :mod:`link` and :mod:`writer` send. NIXL's notifications are not used: the connection
that tells of a peer's death has to be there anyway, and messages on it arrive without anybody polling.

Only host memory is read and written. What UCX uses is its own affair and is set in the environment of the process
(``UCX_TLS``, ``UCX_NET_DEVICES``; ``NIXL_LOG_LEVEL``, ``UCX_LOG_LEVEL``); nothing of it is changed here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from embferry.protocol.errors import LocalProtocolError, TransportError

from ...contract import Capabilities, Region
from ...handles import TOKEN_BYTES, Host, Port, Token, decode_handle
from ...net import address
from ...net.connections import LinkedTransport
from ...net.listener import listen
from .agent import Backends, binding
from .link import Link, LinkSettings
from .messages import Hello
from .server import Server

__all__ = ["NixlTransport"]

END_MARGIN_S = 10.0


class NixlHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-nixl-1"):
    host: Host
    port: Port
    token: Token


class NixlTransport(LinkedTransport[Server, Link]):
    """
    :param backends: NIXL's backends by name, each with its parameters as NIXL takes them (strings); UCX if None. Both
        ends must have one in common.
    :param host: the address to listen on for senders; all of IPv4 is ``0.0.0.0``, all of IPv6 ``::``.
    :param port: 0 for any that is free.
    :param advertise: the IP address peers connect to, if it is another one than ``host``.
    :param connect_timeout_s: how long the receiver may take to answer a connection, its new agent included.
    :param drain_timeout_s: how long writes in flight may take to end when a link ends; then the agent is destroyed.
    :param close_timeout_s: how long :meth:`close` waits for senders to end their writes into the own region. One on
        this host that has not left then may go on (its process is stopped): everything is closed and ``TransportError``
        raised; give the region up rather than use it again.
    :param slice_bytes: the largest request given to the engine: on shared memory it is copied in one go, so this
        bounds how long a revocation and other writes wait.
    :raises TransportError: NIXL is not installed; not worth a retry.
    """

    name = "nixl"
    capabilities = Capabilities(same_host_only=False)

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        *,
        backends: Backends | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        connect_timeout_s: float = 10.0,
        drain_timeout_s: float = 5.0,
        close_timeout_s: float = 5.0,
        slice_bytes: int = 16 << 20,
    ) -> None:
        super().__init__(wake)
        binding()
        self._host, self._port, self._advertise = host, port, advertise or host
        backends = {"UCX": {}} if backends is None else backends
        if not backends or slice_bytes < 1:
            raise LocalProtocolError("the nixl transport needs a backend, and slices of at least one byte")
        self._settings = LinkSettings(backends, slice_bytes, connect_timeout_s, drain_timeout_s)
        self._close_timeout_s = close_timeout_s

    def register(self, region: Region) -> bytes:
        self._check_unregistered()
        advertise, sock = address.advertised(self._advertise), listen(self._host, self._port)
        token, backends = secrets.token_bytes(TOKEN_BYTES), self._settings.backends
        try:
            server = Server(region, token, boot_id(), sock, backends, self._loop, self._outbox)
        except TransportError:
            sock.close()
            raise
        self._receiving = server
        return msgspec.msgpack.encode(NixlHandle(advertise, server.listener.port, token))

    def connect(self, handle: bytes) -> None:
        peer = decode_handle(handle, NixlHandle, self.name)
        to, hello = (address.reachable(peer.host), peer.port), Hello(peer.token, boot_id())
        self._join(handle, lambda: Link(handle, to, hello, self._settings, self._loop, self._outbox, self._forget))

    def _shut(self, links: Sequence[Link]) -> None:
        deadline = time.monotonic() + self._settings.drain_timeout_s + self._settings.connect_timeout_s + END_MARGIN_S
        for link in links:
            link.finished.wait(max(0.0, deadline - time.monotonic()))
            link.join(max(0.0, deadline - time.monotonic()))
        if self._receiving is not None and not self._receiving.close(self._close_timeout_s):
            raise TransportError(
                f"a stopped writer has not left the region within {self._close_timeout_s} s; give the region up",
                retryable=False,
            )


def boot_id() -> str:
    """The same in every process of this host, containers included, and in none of another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
