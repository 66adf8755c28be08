"""The ``mooncake`` transport: one-sided writes of the Mooncake Transfer Engine, from the tensor into the blocks.

The receiver has one engine and a side channel (:mod:`channel`); the handle names both. A sender has an engine and a
connection for each receiver, so that ending a link ends its transfers. :mod:`access` is how revocation is made
true although the engine cannot revoke; :mod:`engine` is what is known of the engine.

Threads: one that serves the side channels, and on the sending side one a receiver that drives its engine; beside them
the engine's own.

Beside the transport, this is where users of the origin look for the names of its wire; they are in :mod:`wire` and
:mod:`embferry.disaggregation.origin`, and ``docs/origin-wire.md`` says how to drive it.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import msgspec

from ..base import address
from ..base.conn_multimodal import Capabilities, Event, Piece, Region, Transport, Window, Written
from ..base.handles import decode_handle
from ..base.loop import Loop
from ..base.outbox import Outbox
from ..base.windows import Rows
from ..bootstrap import BootstrapServer as MooncakeEmbeddingBootstrapServer
from ..origin.frames import EmbeddingArgsRegisterInfo, TransferEmbeddingChunk, TransferEmbeddingInfo
from ..protocol.errors import LocalProtocolError, TransportError
from ..protocol.layout import MAX_FIELDS
from . import channel
from .engine import P2P, Engine, EngineSettings
from .flights import Cargo, Flights
from .link import Link
from .server import Server
from .wire.manager import MooncakeEmbeddingManager
from .wire.receiver import MooncakeEmbeddingReceiver
from .wire.receiving import LanguageManager
from .wire.sending import EncodeManager, MooncakeEmbeddingSender
from .wire.settings import OriginSettings, origin_layout

__all__ = [
    "EmbeddingArgsRegisterInfo",
    "EncodeManager",
    "LanguageManager",
    "MooncakeEmbeddingBootstrapServer",
    "MooncakeEmbeddingManager",
    "MooncakeEmbeddingReceiver",
    "MooncakeEmbeddingSender",
    "MooncakeTransport",
    "OriginSettings",
    "TransferEmbeddingChunk",
    "TransferEmbeddingInfo",
    "origin_layout",
]

MAX_BYTES = 1 << 46  # more than any machine's memory; keeps every product below 63 bits
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class MooncakeHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-mooncake-1"):
    segment: Name
    """The receiver's name among engines."""
    protocol: Name
    metadata_server: Name
    host: Annotated[str, msgspec.Meta(max_length=64)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    """Of the side channel."""
    token: Annotated[bytes, msgspec.Meta(min_length=channel.TOKEN_BYTES, max_length=channel.TOKEN_BYTES)]
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    rows: Annotated[tuple[tuple[Size, Size], ...], msgspec.Meta(min_length=1, max_length=MAX_FIELDS)]


class MooncakeTransport(Transport):
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
        self._outbox = Outbox(lambda: self.wake())
        self._loop = Loop("embferry-mooncake", self._outbox.fail)
        self._server: Server | None = None
        self._links: dict[bytes, Link] = {}
        self._unfinished: set[Link] = set()
        self._lock = threading.Lock()  # of _links and _unfinished, which other threads change too
        self._closed = False

    def register(self, region: Region) -> bytes:
        """:raises TransportError: the engine is not installed or cannot start, or the port is taken.
        :raises LocalProtocolError: private memory (see :mod:`alias`), or as in the contract."""
        if self._server is not None or self._closed:
            raise LocalProtocolError("one region a transport; make another transport for another region")
        if region.fd is None:
            raise LocalProtocolError(
                "the mooncake transport needs memory it can map twice: MultimodalDataBuffers(..., shared=True)"
            )
        if address.own(self._settings.host).is_unspecified:
            raise LocalProtocolError(f"peers cannot connect to {self._settings.host}; advertise this host's address")
        engine = Engine(self._settings)
        token = secrets.token_bytes(channel.TOKEN_BYTES)
        listener: socket.socket | None = None
        try:
            family = socket.AF_INET6 if address.own(self._host).version == 6 else socket.AF_INET
            listener = socket.create_server((self._host, self._port), family=family, backlog=128)
            handle = MooncakeHandle(
                engine.segment,
                self._settings.protocol,
                self._settings.metadata_server,
                self._settings.host,
                listener.getsockname()[1],
                token,
                region.num_blocks,
                region.rows,
            )
            self._server = Server(region, engine, token, listener, self._revoke_grace_s, self._loop, self._outbox)
        except BaseException as error:
            if listener is not None:
                listener.close()
            engine.close()
            if isinstance(error, OSError):
                raise TransportError(f"cannot serve on {self._host} port {self._port}: {error}") from error
            raise
        return msgspec.msgpack.encode(handle)

    def admit(self, window: Window) -> None:
        self._registered().access.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self._registered().access.close_blocks(epoch, blocks)

    def revoke(self, epoch: int) -> None:
        self._registered().access.revoke(epoch)

    def connect(self, handle: bytes) -> None:
        """As in the contract. What goes wrong later, as when the engine cannot start, is reported as ``LinkLost``."""
        peer = decode_handle(handle, MooncakeHandle, self.name)
        _check(peer, self._settings)
        with self._lock:
            if self._closed:
                raise LocalProtocolError("this transport is closed")
            if handle in self._links:
                return
            try:
                link = Link(
                    handle,
                    (peer.host, peer.port),
                    peer.token,
                    Rows(peer.rows, peer.num_blocks),
                    self._connect_timeout_s,
                    partial(self._open_flights, peer.segment),
                    self._loop,
                    self._outbox,
                    self._forget,
                )
            except OSError as error:
                raise TransportError(f"cannot connect to {peer.host} port {peer.port}: {error}") from error
            self._links[handle] = link
            self._unfinished.add(link)

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            link = self._links.get(handle)
        if link is None:
            self._outbox.post(Written(ticket, TransportError("there is no link to this receiver; connect first")))
        else:
            link.write(epoch, pieces, ticket)

    def disconnect(self, handle: bytes) -> None:
        with self._lock:
            link = self._links.pop(handle, None)
        if link is not None:
            link.end(TransportError("this end disconnected"), lost=False)

    def poll(self) -> list[Event]:
        return self._outbox.drain()

    def close(self) -> None:
        """Waits for the engines to end: some milliseconds each, in which the interpreter stands still. If a peer hangs
        in the middle of its engine's first handshake, as long as the engine waits for that (``MC_HANDSHAKE_*``)."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._unfinished)
        for link in links:
            link.end(TransportError("this end was closed"), lost=False)
        for link in links:
            link.join()
        if self._server is not None:
            self._server.close()
        self._loop.close()

    def _open_flights(self, segment: str, on_carried: Callable[[Cargo], None]) -> Flights:
        return Flights(partial(Engine, self._settings), segment, self._register_sources, on_carried)

    def _forget(self, handle: bytes, link: Link) -> None:
        with self._lock:
            self._unfinished.discard(link)
            if self._links.get(handle) is link:
                del self._links[handle]

    def _registered(self) -> Server:
        if self._server is None:
            raise LocalProtocolError("no region is registered with this transport; call register first")
        return self._server


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
