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
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from embferry.protocol.errors import LocalProtocolError, TransportError

from ..contract import Capabilities, Region
from ..handles import TOKEN_BYTES, decode_handle
from ..net import address as addresses
from ..net.connections import LinkedTransport
from ..net.listener import listen
from ..receive_region import ReceiveRegion
from .link import Link, Patience
from .server import Server
from .source import Habits, Source
from .wire import HttpAddress, HttpHandle, destination, split_base

__all__ = ["HttpTransport"]

GOODBYE_S = 1.0  # for telling the senders, at close
MAX_SOURCES = 256
TRIES_S = 2.0  # a silence is believed after so many times the patience


class HttpTransport(LinkedTransport[ReceiveRegion, Link]):
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
        self._server: Server | None = None
        self._address = b""
        self._token = b""
        self._sources: dict[bytes, Source] = {}

    @property
    def address(self) -> bytes:
        """:raises TransportError: the sending end cannot listen."""
        with self._lock:
            self._serve()
            return self._address

    def register(self, region: Region) -> bytes:
        with self._lock:
            self._check_unregistered()
            self._receiving, self._token = ReceiveRegion(region, self._outbox), secrets.token_bytes(TOKEN_BYTES)
            return msgspec.msgpack.encode(HttpHandle(self._token))

    def connect_to_sender(self, address: bytes) -> None:
        to = destination(address, self._proxy)
        landing = self._registered()
        with self._lock:
            self._check_open()
            if address in self._sources:
                return
            if len(self._sources) >= MAX_SOURCES:
                raise TransportError(f"{MAX_SOURCES} senders are being asked already", retryable=False)
            forget = partial(self._forget_source, address)
            self._sources[address] = Source(to, self._token.hex(), landing, self._loop, self._habits, forget)

    def connect(self, handle: bytes) -> None:
        token = decode_handle(handle, HttpHandle, self.name).token.hex()
        self._join(handle, lambda: self._link(handle, token))

    def _link(self, handle: bytes, token: str) -> Link:
        server = self._serve()
        link = Link(
            handle,
            self._patience,
            self._loop,
            self._outbox,
            publish=lambda: server.publish(token),
            waiting=lambda: server.waiting(token),
            forget=self._forget,
        )
        self._loop.call(lambda: server.links.__setitem__(token, link))
        return link

    def _shut(self, links: Sequence[Link]) -> None:
        if self._server is not None:
            self._loop.call(self._server.stop)
        if self._receiving is not None:
            self._receiving.close()
        with self._lock:
            sources = list(self._sources.values())
        told = [threading.Event() for _ in sources]
        for source, event in zip(sources, told, strict=True):
            self._loop.call(partial(source.stop, event.set))
        until = time.monotonic() + GOODBYE_S
        for event in told:
            event.wait(max(0.0, until - time.monotonic()))
        for source in sources:
            self._loop.call(source.hang_up)

    def _serve(self) -> Server:
        """The lock is held."""
        self._check_open()
        if self._server is not None:
            return self._server
        base = self._advertise
        if not base.startswith("http://"):
            addresses.advertised(base)
        server = self._server = Server(listen(self._host, self._port), self._loop, self._habits.wait)
        if not base.startswith("http://"):
            port = server.listener.port
            base = f"http://[{base}]:{port}" if ":" in base else f"http://{base}:{port}"
        self._address = msgspec.msgpack.encode(HttpAddress(base, server.secret))
        return server

    def _forget(self, handle: bytes, link: Link) -> None:
        super()._forget(handle, link)
        token = decode_handle(handle, HttpHandle, self.name).token.hex()
        if self._server is not None and self._server.links.get(token) is link:
            del self._server.links[token]

    def _forget_source(self, address: bytes, source: Source) -> None:
        with self._lock:
            if self._sources.get(address) is source:
                del self._sources[address]
