"""A server process and its children. Nothing of it outlives :meth:`Server.end`."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from ..processes import Child

START_S, END_S, POLL_S = 300.0, 15.0, 0.5
REASON = re.compile(r"^(?:.*\s)?((?:\w+\.)*\w*(?:Error|Exception|Refused|Invalid)\b: .*)")
"""The last line of a traceback, after any prefix that a log adds."""


class StartError(Exception):
    """A server did not start; the text says why."""


class Server(Child):
    """A running server.

    Args:
        name: for messages.
        command: the program and its arguments.
        url: where it will answer; ``/health`` there says that it is ready.
        log: the file for its output.
        env: its environment.
    """

    def __init__(self, name: str, command: Sequence[str], url: str, log: Path, env: Mapping[str, str]) -> None:
        super().__init__(command, log.open("ab+"), signal.SIGTERM, env=dict(env))
        self.name, self.command, self.url = name, list(command), url
        self._client = httpx.Client(timeout=5, trust_env=False)  # making one takes longer than a request

    def is_ready(self) -> bool:
        """Returns whether the server answers.

        Raises:
            StartError: it has ended.
        """
        if not self.alive:
            raise StartError(f"{self.name} ended with {self.process.returncode}: {first_error(self.lines())}")
        try:
            return self._client.get(f"{self.url}/health").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        super().kill()
        self._client.close()


def started(servers: Sequence[Server], report: Callable[[str], None], within_s: float = START_S) -> None:
    """Waits until all servers are ready.

    Raises:
        StartError: one has ended, or takes too long.
    """
    waiting, deadline = list(servers), time.monotonic() + within_s
    while waiting:
        report("starting " + ", ".join(server.name for server in waiting))
        waiting = [server for server in waiting if not server.is_ready()]
        if waiting and time.monotonic() > deadline:
            names = ", ".join(server.name for server in waiting)
            raise StartError(f"{names} not ready after {within_s:g} s: {first_error(waiting[0].lines())}")
        time.sleep(POLL_S if waiting else 0)


def ended(servers: Sequence[Server], within_s: float = END_S) -> None:
    """Asks all servers to end; kills what has not ended in time."""
    for server in servers:
        server.process.send_signal(signal.SIGTERM)
    for server in servers:
        server.end(within_s)


def first_error(lines: Sequence[str]) -> str:
    """Returns the first error in a log, or else its last line."""
    errors = [found[1] for line in lines if (found := REASON.match(line))]
    return (errors or [line.strip() for line in reversed(lines) if line.strip()] or ["its log is empty"])[0][:300]
