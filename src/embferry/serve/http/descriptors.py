"""The descriptors of a process: how many it may have, and which part of them a use may take.

Without a free descriptor, a process can neither accept nor make a connection. So each use has a part of its own, and
the parts leave enough for the rest. In a router, the connections of clients and its calls to workers have 30 % each,
and fetches of media 10 %; in a worker, HTTP connections have 20 %, and every other listener an eighth
(:mod:`embferry.transports.net.listener`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import time
from typing import Any

log = logging.getLogger(__name__)

REPORT_SECONDS = 10.0
"""A shortage that lasts is logged once in this time."""
WANTED_OPEN_FILES = 65_536


def within_open_files(connections: int, share: float) -> int:
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


class Reports:
    """Lets a message pass once in ``REPORT_SECONDS``."""

    def __init__(self) -> None:
        self._next = 0.0

    def is_due(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + REPORT_SECONDS
        return True


class ExceptionHandler:
    """The event loop's handler of exceptions: asyncio reports a lack of open files thousands of times a second."""

    def __init__(self) -> None:
        self._reports = Reports()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        is_shortage = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS)
        if not is_shortage or "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif self._reports.is_due():
            log.error("no connection can be accepted now: %s", error)
