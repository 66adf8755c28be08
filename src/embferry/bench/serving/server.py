"""A server process and its children. Nothing of it outlives :meth:`Server.end`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

START_S, END_S = 300.0, 15.0
POLL_S = 0.5
SHARED = "/dev/shm"
REASON = re.compile(r"^(?:.*\s)?((?:\w+\.)*\w*(?:Error|Exception|Refused|Invalid)\b: .*)")
"""The last line of a traceback, after any prefix that a log adds."""


class StartError(Exception):
    """A server did not start; the text says why."""


class Server:
    """A running server.

    Args:
        name: for messages.
        command: the program and its arguments.
        url: where it will answer; ``/health`` there says that it is ready.
        log: the file for its output.
        env: its environment.
    """

    def __init__(self, name: str, command: Sequence[str], url: str, log: Path, env: Mapping[str, str]) -> None:
        self.name, self.command, self.url, self.log = name, list(command), url, log
        self._client = httpx.Client(timeout=5, trust_env=False)  # making one takes longer than a request
        launch = [sys.executable, "-m", "embferry.bench.processes", str(os.getpid())]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [*launch, *command],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C reaches only the benchmark, which ends its servers in order
            )

    @property
    def pid(self) -> int:
        """The server's process id, which is also that of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def is_ready(self) -> bool:
        """Returns whether the server answers.

        Raises:
            StartError: it has ended.
        """
        if not self.alive or self._client.is_closed:
            raise StartError(f"{self.name} ended with {self._process.returncode}: {last_error(self.log)}")
        try:
            return self._client.get(f"{self.url}/health").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """Sends SIGKILL to the server and all of its children."""
        left = _mapped(self._process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._client.close()
        _remove(left)

    def ask_to_end(self) -> None:
        if self.alive:
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Asks the server to end; kills what has not ended in time."""
        self.ask_to_end()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self.kill()


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
            raise StartError(f"{names} not ready after {within_s:g} s: {last_error(waiting[0].log)}")
        time.sleep(POLL_S if waiting else 0)


def last_error(log: Path) -> str:
    """Returns the first error in a log, or else its last line."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [found[1] for line in lines if (found := REASON.match(line))]
    last = next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
    return (errors[0] if errors else last)[:300]


def _mapped(group: int) -> set[int]:
    """Returns the inodes of shared memory that the processes of a group have mapped.

    Killed processes leave its names behind. The names are not in the maps: the C library renames semaphores.
    """
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            # The third word after the name, which stands in parentheses and may have spaces.
            if int((process / "stat").read_text().rpartition(")")[2].split()[2]) != group:
                continue
            lines = (process / "maps").read_text().splitlines()
            found.update(int(line.split()[4]) for line in lines if f" {SHARED}/" in line)
    return found


def _remove(inodes: set[int]) -> None:
    for entry in os.scandir(SHARED):
        if entry.inode() in inodes:
            with suppress(OSError):  # already removed
                os.unlink(entry.path)
