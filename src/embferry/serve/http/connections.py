"""Bounds on the connections of an HTTP server, so that idle ones do not use up the process's open files."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
REQUEST_SECONDS = 10.0
"""Seconds within which the head of a connection's first request must have arrived."""
REPORT_SECONDS = 10.0
"""A shortage that lasts is logged once in this time."""
WANTED_OPEN_FILES = 65_536


def within_open_files(connections: int, share: float = 0.5) -> int:
    """Returns ``connections``, or this share of the open files that the process may have if that is less.

    Raises the process's limit on open files first, as far as the system permits.
    """
    soft = raise_open_file_limit()
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, int(soft * share)))


def raise_open_file_limit() -> int:
    """Raises the process's limit on open files, as far as the system permits. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class _Reports:
    """Lets a message pass once in ``REPORT_SECONDS``."""

    def __init__(self) -> None:
        self._next = 0.0

    def is_due(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + REPORT_SECONDS
        return True


def bounded_protocol(most: int) -> type[H11Protocol]:
    """Returns uvicorn's protocol for a server that keeps at most ``most`` connections.

    A further connection takes the place of the one that has been idle longest, and is closed if none is idle. A
    connection whose first request does not arrive in time is closed too.
    """
    idle: dict[BoundedProtocol, None] = {}  # connections without a request, the longest idle one first
    reports = _Reports()

    class BoundedProtocol(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                if reports.is_due():
                    log.warning("%d connections are open; idle ones make room for others", most)
                if not idle:
                    transport.abort()
                    return
                victim = next(iter(idle))
                del idle[victim]
                victim.transport.abort()
            idle[self] = None
            self._late = self.loop.call_later(REQUEST_SECONDS, transport.abort)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._used()
                if not self.cycle.response_complete:
                    idle.pop(self, None)

        def on_response_complete(self) -> None:
            if not self.transport.is_closing():
                idle[self] = None
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._used()
            idle.pop(self, None)
            super().connection_lost(exc)

        def _used(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return BoundedProtocol


class ExceptionHandler:
    """The event loop's handler of exceptions: asyncio reports a lack of open files thousands of times a second."""

    def __init__(self) -> None:
        self._reports = _Reports()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        is_shortage = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS)
        if not is_shortage or "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif self._reports.is_due():
            log.error("no connection can be accepted now: %s", error)
