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
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from ..base import address
from ..base.conn_multimodal import Capabilities, Event, Piece, Region, Transport, Window, Written
from ..base.handles import decode_handle
from ..base.loop import Loop
from ..base.outbox import Outbox
from ..protocol.errors import LocalProtocolError, TransportError
from .agent import Backends, binding
from .link import Link, LinkSettings
from .messages import TOKEN_BYTES, Hello
from .server import Server

__all__ = ["NixlTransport"]

END_MARGIN_S = 10.0


class NixlHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-nixl-1"):
    host: Annotated[str, msgspec.Meta(max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]


class NixlTransport(Transport):
    """
    :param backends: NIXL's backends by name, each with its parameters as NIXL takes them (strings); UCX if None. Both
        ends must have one in common.
    :param host: the address to listen on for senders; all of IPv4 is ``0.0.0.0``, all of IPv6 ``::``.
    :param port: 0 for any that is free.
    :param advertise: the IP address peers connect to, if it is another one than ``host``.
    :param connect_timeout_s: how long the receiver may take to answer a connection, its new agent included.
    :param drain_timeout_s: how long writes in flight may take to end when a link ends; then the agent is destroyed.
    :param close_timeout_s: how long :meth:`close` waits for senders to end their writes into the own region.
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
        self._outbox = Outbox(lambda: self.wake())
        self._loop = Loop("embferry-nixl", self._outbox.fail)
        self._server: Server | None = None
        self._links: dict[bytes, Link] = {}
        self._ending: set[Link] = set()
        self._lock = threading.Lock()  # of _links and _ending, which the loop's thread changes too
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
        token = secrets.token_bytes(TOKEN_BYTES)
        handle = NixlHandle(self._advertise, listener.getsockname()[1], token)
        try:
            self._server = Server(region, token, boot_id(), listener, self._settings.backends, self._loop, self._outbox)
        except TransportError:
            listener.close()
            raise
        return msgspec.msgpack.encode(handle)

    def admit(self, window: Window) -> None:
        self._registered().gate.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        server = self._registered()
        server.carry_out_soon(server.gate.close_blocks(epoch, blocks))

    def revoke(self, epoch: int) -> None:
        server = self._registered()
        server.carry_out_soon(server.gate.revoke(epoch))

    def connect(self, handle: bytes) -> None:
        peer = decode_handle(handle, NixlHandle, self.name)
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
                    Hello(peer.token, boot_id()),
                    self._settings,
                    self._loop,
                    self._outbox,
                    self._forget,
                )
            except OSError as error:
                raise TransportError(f"cannot connect to {host} port {peer.port}: {error}") from error

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            link = self._links.get(handle)
        if link is None:
            self._outbox.post(Written(ticket, TransportError("there is no connection to this receiver; connect first")))
        else:
            link.write(epoch, pieces, ticket)

    def disconnect(self, handle: bytes) -> None:
        with self._lock:
            link = self._links.pop(handle, None)
            if link is not None:
                self._ending.add(link)
        if link is not None:
            self._loop.call(partial(link.end, TransportError("this end disconnected"), lost=False))

    def poll(self) -> list[Event]:
        return self._outbox.drain()

    def close(self) -> None:
        """:raises TransportError: a writer on this host has not left the region and may go on (its process is stopped):
        everything is closed, but give the region up rather than use it again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = [*self._links.values(), *self._ending]
        for link in links:
            self._loop.call(partial(link.end, TransportError("this end was closed"), lost=False))
        deadline = time.monotonic() + self._settings.drain_timeout_s + self._settings.connect_timeout_s + END_MARGIN_S
        for link in links:
            link.finished.wait(max(0.0, deadline - time.monotonic()))
            link.join(max(0.0, deadline - time.monotonic()))
        empty = self._server is None or self._server.close(self._close_timeout_s)
        self._loop.close()
        if not empty:
            raise TransportError(
                f"a stopped writer has not left the region within {self._close_timeout_s} s; give the region up",
                retryable=False,
            )

    def _forget(self, handle: bytes, link: Link) -> None:
        with self._lock:
            self._ending.discard(link)
            if self._links.get(handle) is link:
                del self._links[handle]

    def _registered(self) -> Server:
        if self._server is None:
            raise LocalProtocolError("no region is registered with this transport; call register first")
        return self._server


def boot_id() -> str:
    """The same in every process of this host, containers included, and in none of another."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
