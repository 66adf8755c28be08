"""A listening socket, and uvicorn on it until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from embferry.protocol.errors import TransportError
from embferry.serve.http.absolute_targets import AbsoluteTargets
from embferry.serve.http.address import address_of
from embferry.serve.http.connections import BoundedProtocol, ConnectionLimits, bounded_protocol
from embferry.serve.http.descriptors import ExceptionHandler, within_open_files
from embferry.serve.http.tls_handshake import TlsHandshake
from embferry.trust.refusals import Refusals

log = logging.getLogger(__name__)

BACKLOG = 2048
ACCEPTED_AT_ONCE = 16
"""Connections accepted before their number is checked, so that many at once cannot take every descriptor."""
CLOSE_SECONDS = 1
"""Seconds that open connections get to receive the rest of their responses."""
SPARE_SECONDS = 3
"""Seconds after that in which requests that were cut off end by themselves. What has not ended then is a bug."""
KEEP_ALIVE_SECONDS = 75
"""Seconds for which a connection may be idle after a response. The known clients (routers, OpenAI's library,
proxies) close theirs sooner, so none of them sends a request on a connection that is being closed."""
DEFAULT_LIMITS = ConnectionLimits()

Report = Callable[[str], None]
"""Called once, with the URL at which a process accepts requests from now on."""


def unreported(url: str) -> None:
    """The report of a process that has no supervisor."""


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """Returns a bound, listening TCP socket; port 0 takes a free one.

    Raises:
        TransportError: the address cannot be bound; it names ``flag``, the option for another port.
    """
    try:
        # The address that a worker's transports have too.
        address = address_of(host)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
        # Accepted connections inherit it. asyncio sets it only on sockets that were made with the protocol's number;
        # without it, a response after the first of a connection waits 40 ms for an acknowledgement (RFC 1122, 4.2.3.2).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:  # the latter: of the codec for international names
        is_known = isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno
        why = os.strerror(is_known) if is_known else str(error)
        advice = f"choose another port with {flag} (0 takes a free one)"
        raise TransportError(f"cannot listen on {host}:{port}: {why}; {advice}", retryable=False) from error


async def serve_app(
    app: ASGIApp,
    listener: socket.socket,
    on_start: Callable[[], None],
    on_stop: Callable[[], Awaitable[None]] | None = None,
    is_broken: Callable[[], bool] = lambda: False,
    close_seconds: int = CLOSE_SECONDS,
    limits: ConnectionLimits = DEFAULT_LIMITS,
    share: float = 0.2,
    certificate: ssl.SSLContext | None = None,
    behind_proxy: bool = False,
) -> None:
    """Serves ``app`` until SIGINT or SIGTERM. All callbacks run in the event loop.

    Args:
        app: the application.
        listener: the socket to accept connections on.
        on_start: called when the application accepts requests.
        on_stop: awaited before connections are closed.
        is_broken: asked several times a second; serving ends when it returns true.
        close_seconds: seconds that responses get to finish after ``on_stop``.
        limits: bounds on the connections.
        share: the part of the process's descriptors that they may have.
        certificate: the context for TLS; connections are not encrypted without it.
        behind_proxy: whether ``X-Forwarded-For`` of 127.0.0.1 names the client. Between parts it would let another user
            of the machine write any address into the log.
    """
    most = within_open_files(limits.connections, share)
    limits = replace(limits, connections=most, per_address=min(limits.per_address, most))
    protocol = bounded_protocol(limits)
    config = uvicorn.Config(
        AbsoluteTargets(app),
        ws="none",
        http=protocol,
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        proxy_headers=behind_proxy,
        timeout_graceful_shutdown=close_seconds + SPARE_SECONDS,
    )
    config.load()
    if certificate is not None:
        refusals = Refusals(f"port {listener.getsockname()[1]}")
        config.http_protocol_class = partial(TlsHandshake, protocol, certificate, refusals)  # type: ignore[assignment]
    asyncio.get_running_loop().set_exception_handler(ExceptionHandler())
    server = _Server(config)
    server.on_start, server.on_stop, server.is_broken = on_start, on_stop, is_broken
    server.close_seconds = close_seconds
    await server.serve([listener])


class _Server(uvicorn.Server):
    on_start: Callable[[], None]
    on_stop: Callable[[], Awaitable[None]] | None
    is_broken: Callable[[], bool]
    close_seconds: int

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # the event loop has lowered it to the number that it accepts at once
        self.on_start()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.is_broken()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.on_stop is not None:
            await self.on_stop()
        end = asyncio.get_running_loop().call_later(self.close_seconds, self._cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    def _cut_off(self) -> None:
        """Ends the requests that are left as if their clients had left; uvicorn would log a traceback for each."""
        left = [each for each in self.server_state.connections if isinstance(each, BoundedProtocol)]
        if count := sum([each.cut_off() for each in left]):
            log.warning("%d requests have not ended in %d s and are cut off", count, self.close_seconds)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ends the process in order at the first signal, at once at the second.

        uvicorn raises the first signal again when all is done, which would make a clean end look like a crash.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            for known in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(known)
                signal.signal(known, signal.SIG_DFL)
            self.handle_exit(number, None)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        yield
