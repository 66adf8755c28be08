"""The ``tcp`` transport: scatter/gather from the source tensor, received straight into the blocks, on any network.

The receiver listens; a handle is its address and a random token, which a sender shows first. One connection a handle
and one thread a transport, which serves all of its connections (:mod:`server` receives, :mod:`link` sends,
:mod:`framing` is the format). Writes on one connection are made in order.

``connect`` does not wait: a refusal that the kernel knows at once is raised, any other is reported as
:class:`LinkLost`. Socket buffers are left to the kernel, which tunes them up to ``net.ipv4.tcp_rmem`` and ``tcp_wmem``;
setting them would switch that off.
"""

from __future__ import annotations

import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import msgspec

from ..base import address
from ..base.conn_multimodal import Capabilities, Event, Piece, Region, Revoked, Transport, Window, Written
from ..base.handles import decode_handle
from ..base.loop import Loop
from ..base.outbox import Outbox
from ..base.windows import ranges_of
from ..protocol.errors import LocalProtocolError, TransportError
from . import framing
from .link import Link
from .server import Server

__all__ = ["TcpTransport"]


class TcpHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-tcp-1"):
    host: Annotated[str, msgspec.Meta(max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    token: Annotated[bytes, msgspec.Meta(min_length=framing.TOKEN_BYTES, max_length=framing.TOKEN_BYTES)]


class TcpTransport(Transport):
    """
    :param host: the address to listen on; all of IPv4 is ``0.0.0.0``, all of IPv6 ``::``.
    :param port: 0 for any that is free.
    :param advertise: the IP address peers connect to, if it is another one than ``host``.
    :param connect_timeout_s: how long the receiver may take to answer a connection.
    """

    name = "tcp"
    capabilities = Capabilities(same_host_only=False)

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        super().__init__(wake)
        self._host, self._port, self._advertise = host, port, advertise or host
        self._connect_timeout_s = connect_timeout_s
        self._outbox = Outbox(lambda: self.wake())
        self._loop = Loop("embferry-tcp", self._outbox.fail)
        self._server: Server | None = None
        self._links: dict[bytes, Link] = {}
        self._lock = threading.Lock()  # of _links, which the loop's thread changes too
        self._closed = False

    def register(self, region: Region) -> bytes:
        if self._server is not None or self._closed:
            raise LocalProtocolError("one region a transport; make another transport for another region")
        if address.own(self._advertise).is_unspecified:
            raise LocalProtocolError(f"peers cannot connect to {self._advertise}; advertise this host's address")
        family = socket.AF_INET6 if address.own(self._host).version == 6 else socket.AF_INET
        try:
            listener = socket.create_server((self._host, self._port), family=family, backlog=128)
        except OSError as error:
            raise TransportError(f"cannot listen on {self._host} port {self._port}: {error}") from error
        token = secrets.token_bytes(framing.TOKEN_BYTES)
        handle = TcpHandle(self._advertise, listener.getsockname()[1], token)
        self._server = Server(region, token, listener, self._loop)
        return msgspec.msgpack.encode(handle)

    def admit(self, window: Window) -> None:
        self._registered().windows.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        server = self._registered()
        server.windows.close_blocks(epoch, blocks)
        server.settle()

    def revoke(self, epoch: int) -> None:
        server = self._registered()
        server.windows.revoke(epoch)
        server.settle()
        self._outbox.post(Revoked(epoch))

    def connect(self, handle: bytes) -> None:
        peer = decode_handle(handle, TcpHandle, self.name)
        host = address.reachable(peer.host)
        with self._lock:
            if self._closed:
                raise LocalProtocolError("this transport is closed")
            if handle in self._links:
                return
            try:
                self._links[handle] = Link(
                    handle,
                    (host, peer.port),
                    peer.token,
                    self._connect_timeout_s,
                    self._loop,
                    self._outbox,
                    self._forget,
                )
            except OSError as error:
                raise TransportError(f"cannot connect to {address} port {peer.port}: {error}") from error

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            link = self._links.get(handle)
        if link is None:
            self._outbox.post(Written(ticket, TransportError("there is no connection to this receiver; connect first")))
            return
        try:
            head = framing.head(epoch, ticket, ranges_of(pieces))
        except (OverflowError, struct.error):
            error = TransportError("an offset or the epoch of the write is beyond 64 bits", retryable=False)
            self._outbox.post(Written(ticket, error))
            return
        if not 1 <= len(pieces) <= framing.MAX_RANGES:
            error = TransportError(
                f"a write of {len(pieces)} pieces; make it 1 to {framing.MAX_RANGES}", retryable=False
            )
            self._outbox.post(Written(ticket, error))
            return
        link.write(ticket, head, [piece.source.cast("B") for piece in pieces])

    def disconnect(self, handle: bytes) -> None:
        with self._lock:
            link = self._links.pop(handle, None)
        if link is not None:
            self._loop.call(partial(link.end, TransportError("this end disconnected"), lost=False))

    def poll(self) -> list[Event]:
        return self._outbox.drain()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._links.values())
        for link in links:
            self._loop.call(partial(link.end, TransportError("this end was closed"), lost=False))
        if self._server is not None:
            self._server.windows.close_all()
            self._loop.call(self._server.stop)
        self._loop.close()

    def _forget(self, handle: bytes, link: Link) -> None:
        with self._lock:
            if self._links.get(handle) is link:
                del self._links[handle]

    def _registered(self) -> Server:
        if self._server is None:
            raise LocalProtocolError("no region is registered with this transport; call register first")
        return self._server
