"""A worker as a process: its port, its lease, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from embferry.discovery.bootstrap_client import BootstrapClient, LeaseKeeper
from embferry.discovery.leases import Role, Worker
from embferry.serve.config import Settings
from embferry.serve.worker.address import address_of, url_of
from embferry.serve.worker.http import Service

log = logging.getLogger(__name__)

BACKLOG = 2048
GRACE_SECONDS = 3.0
"""Seconds that requests under way get to finish when the worker is told to stop; then they are ended with an error."""
LAST_WORDS_SECONDS = 1
"""Seconds connections get to take what was still said to them."""


@dataclass(frozen=True, slots=True)
class Started:
    """A process that answers from now on."""

    url: str


Report = Callable[[Started], None]


def unreported(_: Started) -> None:
    """For a process nobody waits for."""


def open_port(settings: Settings, port: int) -> socket.socket:
    """The worker's listening socket. Ends the process with status 2 if others could not reach it by what it says of
    itself, with status 1 if the port cannot be had.
    """
    host = settings.reachable_host
    try:
        unspecified = ipaddress.ip_address(address_of(host)).is_unspecified
    except OSError as error:
        print(
            f"embferry: {host} has no address ({error.strerror or error}); set host or advertise_host", file=sys.stderr
        )
        sys.exit(2)
    if unspecified:
        why = "stands for every address of this machine; set advertise_host to the one that others reach it by"
        print(f"embferry: host {host} {why}", file=sys.stderr)
        sys.exit(2)
    return listen(settings.host, port)


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening TCP socket; port 0 takes a free one. Ends the process with status 1 if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        print(f"embferry: cannot listen on {host}:{port}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def serve_worker(
    app: ASGIApp,
    service: Service,
    listener: socket.socket,
    settings: Settings,
    role: Role,
    endpoint: str,
    report: Report,
) -> None:
    """Serves until SIGINT or SIGTERM, or until the service breaks: then it ends the process with status 1.

    When told to stop, it signs off first, so that routers pass it over; finishes what is under way within
    ``GRACE_SECONDS``; ends the rest with an error; closes everything.
    """
    worker = Worker(
        id=f"{role}-{os.getpid()}-{secrets.token_hex(4)}",
        role=role,
        url=url_of(settings.reachable_host, listener),
        endpoint=endpoint,
        model=settings.model_name,
    )
    keeper = LeaseKeeper(BootstrapClient(settings.bootstrap_url), worker, lambda: service.load)

    def begin() -> None:
        keeper.start()
        log.info("%s worker answers at %s", role, worker.url)
        report(Started(worker.url))

    async def end() -> None:
        service.refuse()
        await asyncio.to_thread(keeper.stop)
        if service.fault is None and not await asyncio.to_thread(service.wait_idle, GRACE_SECONDS):
            log.warning("%g requests are ended unfinished", service.load)
        await asyncio.to_thread(service.close)

    try:
        asyncio.run(serve_app(app, listener, begin, end, broken=lambda: service.fault is not None))
    finally:
        service.close()
        listener.close()
    if service.fault is not None:
        sys.exit(1)


async def serve_app(
    app: ASGIApp,
    listener: socket.socket,
    begin: Callable[[], None],
    end: Callable[[], Awaitable[None]],
    broken: Callable[[], bool] = lambda: False,
    grace: int = LAST_WORDS_SECONDS,
) -> None:
    """Serves ``app`` on a socket until a signal comes. ``begin`` is called when it answers; ``end`` when it is to stop,
    before connections are closed.
    """
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=grace)
    await _Server(config, begin, end, broken).serve([listener])


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        begin: Callable[[], None],
        end: Callable[[], Awaitable[None]],
        broken: Callable[[], bool],
    ) -> None:
        super().__init__(config)
        self._begin, self._end, self._broken = begin, end, broken

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._begin()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._broken()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._end()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal ends the process in order, the second at once.

        uvicorn's own way raises the signal again when all is done, so that a clean end would look like a crash.
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
