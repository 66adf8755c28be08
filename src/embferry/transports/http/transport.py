"""The ``http`` transport: the receiver fetches, over HTTP/1.1 and through the proxies in between.

Only the sender listens. Its address, a URL and a secret, reaches the receiver in a control message; the receiver's
handle is a random token. Each write is published under that token as a resource. The receiver keeps one poll pending,
fetches what is published straight into its blocks, resumes where a connection broke, and reports how each write ended.
All of it runs on one thread a transport:

- :mod:`messages` lists the requests, :mod:`heads` parses and writes their heads;
- :mod:`connection` receives and sends them;
- the sender is :mod:`serving`, :mod:`send_link` and :mod:`resource`;
- the receiver is :mod:`remote_sender`.

A link ends with a request that says so, or by silence: through a proxy, the end of a connection means nothing. The
secret keeps strangers out, and the cluster key if there is one; nothing is encrypted.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.trust.trust import Trust

from ..contract import Capabilities, Region
from ..handles import TOKEN_BYTES, decode_handle
from ..net import address as addresses
from ..net.connections import LinkedTransport
from ..net.listener import DEFAULT_LIMITS, Listener, ListenLimits, listen
from ..net.stalls import STALL_TIMEOUT_S, check_stall_timeout
from ..receive_region import ReceiveRegion
from .messages import HttpAddress, HttpHandle, parse_address, split_base
from .remote_sender import RemoteSender
from .send_link import SendLink
from .serving import SenderServer, ServerConnection

__all__ = ["HttpTransport"]

GOODBYE_S = 1.0  # at close, for telling the senders
MAX_SENDERS = 256


class HttpTransport(LinkedTransport[ReceiveRegion, SendLink]):
    """A transport whose receiver fetches over HTTP.

    Args:
        wake: Called on any thread when :meth:`poll` has events.
        host: The address on which the sender listens; ``0.0.0.0`` is all of IPv4, ``::`` all of IPv6.
        port: 0 for any that is free.
        advertise: What receivers connect to, if that is not ``host``: an IP address, or the URL
            (``http://192.0.2.1:8080/path``) of a proxy in front of the sender.
        proxy: URL of a forward proxy for the receiver's requests, such as ``http://192.0.2.1:3128``; it may resolve
            names.
        poll_s: Seconds a poll of the receiver waits for something to fetch, at most 30; it must be less than the idle
            time-outs of proxies in between.
        stall_timeout_s: Seconds without a new byte until the receiver reports a write as failed; half of it, until it
            repeats the request. Seconds without a request, or without a report of new bytes, until the sender's link
            is lost.
        connections: Number of connections that fetch from one sender at the same time.
        limits: Bounds on the connections of receivers.
        trust: The cluster key, which both ends prove, where the sender may listen, and the certificate. None: what the
            environment says.
    """

    name = "http"
    capabilities = Capabilities()

    def __init__(
        self,
        wake: Callable[[], None] = lambda: None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        proxy: str | None = None,
        poll_s: float = 15.0,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        connections: int = 4,
        limits: ListenLimits = DEFAULT_LIMITS,
        trust: Trust | None = None,
    ) -> None:
        self._trust = Trust.or_environment(trust)
        if not 1 <= poll_s <= 30 or connections < 1:
            raise LocalProtocolError("poll_s must be 1 to 30, connections at least 1")
        self._stall_timeout_s, self._limits = check_stall_timeout(stall_timeout_s), limits
        super().__init__(wake)
        self._host, self._port, self._advertise = host, port, advertise or host
        self._proxy = None if proxy is None else split_base(proxy, allow_names=False)[:2]
        self._poll_s, self._connections = poll_s, connections
        self._server: SenderServer | None = None
        self._address = b""
        self._token = b""
        self._senders: dict[bytes, RemoteSender] = {}

    @property
    def address(self) -> bytes:
        """The sender's address; the first use makes it listen.

        Raises:
            TransportError: It cannot listen.
            LocalProtocolError: Strangers could reach it, and there is no cluster key.
        """
        with self._lock:
            self._serve()
            return self._address

    def register(self, region: Region) -> bytes:
        with self._lock:
            self._check_unregistered()
            self._receiving, self._token = ReceiveRegion(region, self._outbox), secrets.token_bytes(TOKEN_BYTES)
            return msgspec.msgpack.encode(HttpHandle(self._token))

    def connect_to_sender(self, address: bytes) -> None:
        to = parse_address(address, self._proxy, self._trust)
        region = self._registered()
        with self._lock:
            self._check_open()
            if address in self._senders:
                return
            if len(self._senders) >= MAX_SENDERS:
                raise TransportError(f"{MAX_SENDERS} senders are being polled already", retryable=False)
            on_end = partial(self._forget_sender, address)
            limits = self._poll_s, self._stall_timeout_s, self._connections
            self._senders[address] = RemoteSender(
                to, self._token.hex(), region, self._loop, *limits, self._trust.keys, on_end
            )

    def _connect(self, handle: bytes) -> None:
        token = decode_handle(handle, HttpHandle, self.name).token.hex()
        self._join(handle, lambda: self._make_link(handle, token))

    def _make_link(self, handle: bytes, token: str) -> SendLink:
        server = self._serve()
        link = SendLink(
            self._loop,
            self._outbox,
            partial(self._over, handle),
            stall_timeout_s=self._stall_timeout_s,
            on_publish=lambda: server.on_publish(token),
            is_polled=lambda: server.is_polled(token),
        )
        link.scope.call(lambda: server.links.__setitem__(token, link))
        return link

    def _listener(self) -> Listener[ServerConnection] | None:
        return None if self._server is None else self._server.listener

    def _shut(self, links: Sequence[SendLink]) -> None:
        if self._server is not None:
            self._loop.call(self._server.stop)
        if self._receiving is not None:
            self._receiving.close()
        with self._lock:
            senders = list(self._senders.values())
        responded = [threading.Event() for _ in senders]
        for sender, event in zip(senders, responded, strict=True):
            sender.scope.call(partial(sender.stop, event.set))
        deadline = time.monotonic() + GOODBYE_S
        for event in responded:
            event.wait(max(0.0, deadline - time.monotonic()))
        for sender in senders:
            sender.scope.call(sender.hang_up)

    def _serve(self) -> SenderServer:
        """Returns the server, which is made at the first call. The caller holds the lock."""
        self._check_open()
        if self._server is not None:
            return self._server
        base = self._advertise
        is_url = base.startswith(("http://", "https://"))
        if not is_url:
            addresses.advertised(base)
            self._trust.check_host(base, "the http transport")
        self._trust.check_listening(self._host, "the http transport")
        sock = listen(self._host, self._port)
        try:
            server = SenderServer(sock, self._loop, self._poll_s, self._limits, self._trust.keys, self._trust.tls)
        except BaseException:
            sock.close()
            raise
        self._server = server
        if not is_url:
            port = server.listener.port
            base = f"{self._trust.scheme}://[{base}]:{port}" if ":" in base else f"{self._trust.scheme}://{base}:{port}"
        self._address = msgspec.msgpack.encode(HttpAddress(base, server.secret))
        return server

    def _forget(self, handle: bytes, link: SendLink) -> bool:
        token = decode_handle(handle, HttpHandle, self.name).token.hex()
        if self._server is not None and self._server.links.get(token) is link:
            del self._server.links[token]
        return super()._forget(handle, link)

    def _forget_sender(self, address: bytes, sender: RemoteSender) -> None:
        with self._lock:
            if self._senders.get(address) is sender:
                del self._senders[address]
