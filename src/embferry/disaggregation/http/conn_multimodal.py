"""The ``http`` transport: the receiver fetches, over HTTP/1.1 and through whatever proxies stand between.

Only the sending end listens. Its address, a URL and a secret, reaches the receiver in a control message
(:meth:`HttpTransport.reach`); the receiver's handle is a random token. A write is published under that token as a
resource. The receiver keeps one request waiting for news, fetches what comes straight into its blocks, resumes where a
connection broke, and says how each write ended. :mod:`wire` is the list of requests; :mod:`server`, :mod:`incoming`
and :mod:`link` are the sending end, :mod:`source`, :mod:`client` and :mod:`fetch` the receiving one; one thread a
transport.

The end of a link is a goodbye, or silence: HTTP through a proxy has no connection whose end would mean something. The
secret keeps strangers out; nothing is encrypted.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from ..base import address as addresses
from ..base.conn_multimodal import Capabilities, Event, Piece, Region, Revoked, Transport, Window, Written
from ..base.handles import decode_handle
from ..base.loop import Loop
from ..base.outbox import Outbox
from ..base.windows import MAX_EPOCH, ranges_of
from ..protocol.errors import LocalProtocolError, TransportError
from .fetch import Landing
from .link import Link, Patience
from .server import Server
from .source import Habits, Source
from .wire import MAX_PAYLOAD, MAX_RANGES, TOKEN_BYTES, HttpAddress, HttpHandle, destination, split_base

__all__ = ["HttpTransport"]

GOODBYE_S = 1.0  # for telling the senders, at close
MAX_SOURCES = 256
TRIES_S = 2.0  # a silence is believed after so many times the patience


class HttpTransport(Transport):
    """
    :param host: the address the sending end listens on; all of IPv4 is ``0.0.0.0``, all of IPv6 ``::``.
    :param port: 0 for any that is free.
    :param advertise: what receivers reach it by, if that is not ``host``: an IP address, or the URL
        (``http://192.0.2.1:8080/path``) of a proxy in front of it.
    :param proxy: ``http://192.0.2.1:3128``, a forward proxy the receiving end asks through; it may look names up.
    :param poll_s: seconds a request of the receiver waits for something to fetch, at most 30; less than the idle
        time-outs of proxies between.
    :param patience_s: seconds without an answer that is due, or without a request: then the other end is asked again,
        or its link is lost.
    :param connections: fetching from one sender at the same time.
    """

    name = "http"
    capabilities = Capabilities(same_host_only=False)

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        proxy: str | None = None,
        poll_s: float = 15.0,
        patience_s: float = 5.0,
        connections: int = 4,
    ) -> None:
        super().__init__(wake)
        if not 1 <= poll_s <= 30 or patience_s <= 0 or connections < 1:
            raise LocalProtocolError("poll_s is 1 to 30, patience_s greater than 0, connections at least 1")
        self._host, self._port, self._advertise = host, port, advertise or host
        self._proxy = None if proxy is None else split_base(proxy, names=False)[:2]
        self._habits = Habits(poll_s, patience_s, TRIES_S * patience_s, connections)
        self._patience = Patience(patience_s, max(6 * patience_s, 2 * poll_s))
        self._outbox = Outbox(lambda: self.wake())
        self._loop = Loop("embferry-http", self._outbox.fail)
        self._lock = threading.Lock()  # of what follows, which the loop's thread changes too
        self._server: Server | None = None
        self._address = b""
        self._links: dict[bytes, Link] = {}
        self._landing: Landing | None = None
        self._token = b""
        self._sources: dict[bytes, Source] = {}
        self._closed = False

    @property
    def address(self) -> bytes:
        """:raises TransportError: the sending end cannot listen."""
        with self._lock:
            self._serve()
            return self._address

    def register(self, region: Region) -> bytes:
        with self._lock:
            if self._landing is not None or self._closed:
                raise LocalProtocolError("one region a transport; make another transport for another region")
            self._landing, self._token = Landing(region), secrets.token_bytes(TOKEN_BYTES)
            return msgspec.msgpack.encode(HttpHandle(self._token))

    def reach(self, address: bytes) -> None:
        to = destination(address, self._proxy)
        landing = self._registered()
        with self._lock:
            if self._closed:
                raise LocalProtocolError("this transport is closed")
            if address in self._sources:
                return
            if len(self._sources) >= MAX_SOURCES:
                raise TransportError(f"{MAX_SOURCES} senders are being asked already", retryable=False)
            forget = partial(self._forget_source, address)
            self._sources[address] = Source(to, self._token.hex(), landing, self._loop, self._habits, forget)

    def admit(self, window: Window) -> None:
        self._registered().windows.admit(window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        landing = self._registered()
        landing.windows.close_blocks(epoch, blocks)
        landing.settle()

    def revoke(self, epoch: int) -> None:
        landing = self._registered()
        landing.windows.revoke(epoch)
        landing.settle()
        self._outbox.post(Revoked(epoch))

    def connect(self, handle: bytes) -> None:
        token = decode_handle(handle, HttpHandle, self.name).token.hex()
        with self._lock:
            if handle in self._links and not self._closed:
                return
            server = self._serve()
            link = Link(
                handle,
                self._patience,
                self._loop,
                self._outbox,
                publish=lambda: server.publish(token),
                waiting=lambda: server.waiting(token),
                forget=self._forget_link,
            )
            self._links[handle] = link
            self._loop.call(lambda: server.links.__setitem__(token, link))

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        with self._lock:
            link = self._links.get(handle)
        if link is None:
            self._outbox.post(Written(ticket, TransportError("there is no connection to this receiver; connect first")))
            return
        try:
            ranges = ranges_of(pieces)
        except OverflowError:
            ranges = None
        sizes = sum(piece.source.nbytes for piece in pieces)
        if ranges is None or not 0 <= epoch <= MAX_EPOCH:
            why = "an offset or the epoch of the write is beyond 64 bits"
        elif not 1 <= len(pieces) <= MAX_RANGES or sizes > MAX_PAYLOAD:
            why = f"a write of {len(pieces)} pieces, {sizes} bytes; make it 1 to {MAX_RANGES}, {MAX_PAYLOAD} bytes"
        else:
            link.write(ticket, epoch, secrets.token_hex(8), ranges, [piece.source.cast("B") for piece in pieces])
            return
        self._outbox.post(Written(ticket, TransportError(why, retryable=False)))

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
            links, sources, server = list(self._links.values()), list(self._sources.values()), self._server
        for link in links:
            self._loop.call(partial(link.end, TransportError("this end was closed"), lost=False))
        if server is not None:
            self._loop.call(server.stop)
        if self._landing is not None:
            self._landing.windows.close_all()
            self._landing.settle()
        told = [threading.Event() for _ in sources]
        for source, event in zip(sources, told, strict=True):
            self._loop.call(partial(source.stop, event.set))
        until = time.monotonic() + GOODBYE_S
        for event in told:
            event.wait(max(0.0, until - time.monotonic()))
        for source in sources:
            self._loop.call(source.hang_up)
        self._loop.close()

    def _serve(self) -> Server:
        """The lock is held."""
        if self._closed:
            raise LocalProtocolError("this transport is closed")
        if self._server is not None:
            return self._server
        advertise = self._advertise
        if not advertise.startswith("http://") and addresses.own(advertise).is_unspecified:
            raise LocalProtocolError(f"peers cannot connect to {advertise}; advertise this host's address")
        family = socket.AF_INET6 if addresses.own(self._host).version == 6 else socket.AF_INET
        try:
            listener = socket.create_server((self._host, self._port), family=family, backlog=128)
        except OSError as error:
            raise TransportError(f"cannot listen on {self._host} port {self._port}: {error}") from error
        server = self._server = Server(listener, self._loop, self._habits.wait)
        base = advertise
        if not advertise.startswith("http://"):
            base = f"http://[{advertise}]:{server.port}" if ":" in advertise else f"http://{advertise}:{server.port}"
        self._address = msgspec.msgpack.encode(HttpAddress(base, server.secret))
        return server

    def _forget_link(self, handle: bytes, link: Link) -> None:
        with self._lock:
            if self._links.get(handle) is link:
                del self._links[handle]
            server = self._server
        token = decode_handle(handle, HttpHandle, self.name).token.hex()
        if server is not None and server.links.get(token) is link:
            del server.links[token]

    def _forget_source(self, address: bytes, source: Source) -> None:
        with self._lock:
            if self._sources.get(address) is source:
                del self._sources[address]

    def _registered(self) -> Landing:
        if self._landing is None:
            raise LocalProtocolError("no region is registered with this transport; call register first")
        return self._landing
