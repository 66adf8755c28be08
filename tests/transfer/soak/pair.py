"""The two processes of a soak, with a relay between them, and what each of them holds."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from embferry.testing.proxy import ChaosProxy

ROOT = Path(__file__).parents[3]
ROLES = ("sending", "receiving")
END_SECONDS = 20.0


@dataclass(frozen=True)
class Signs:
    """The vital signs of a process. ``rss``: its resident memory in bytes."""

    rss: int
    fds: int
    threads: int


class Pair:
    """Both processes. ``control`` and ``data`` relay their connections; over shm, nothing passes ``data``."""

    def __init__(self, processes: dict[str, subprocess.Popen[str]], control: ChaosProxy, data: ChaosProxy) -> None:
        self._processes, self.control, self.data = processes, control, data
        told = {role: self._line(role) for role in ROLES}
        control.upstream = int(told["sending"]["endpoint"].rpartition(":")[2])
        data.upstream = told["receiving"]["port"]
        self._endpoint = f"tcp://127.0.0.1:{control.port}"
        self._seen = {role: psutil.Process(process.pid) for role, process in processes.items()}

    def run(self, first: int, count: int) -> dict[str, dict[str, Any]]:
        """Runs ``count`` rooms, and returns what each end says of all rooms so far."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.write(json.dumps([first, count, self._endpoint]) + "\n")
            process.stdin.flush()
        return {role: self._line(role) for role in ROLES}

    def signs(self) -> dict[str, Signs]:
        return {
            role: Signs(seen.memory_info().rss, seen.num_fds(), seen.num_threads()) for role, seen in self._seen.items()
        }

    def _line(self, role: str) -> dict[str, Any]:
        stdout = self._processes[role].stdout
        assert stdout is not None
        line = stdout.readline()
        assert line, f"the {role} process has ended; standard error says why"
        return dict(json.loads(line))


@contextlib.contextmanager
def running_pair(transport: str, seed: int) -> Iterator[Pair]:
    """Starts both processes; at the end, none is left."""
    with ChaosProxy() as control, ChaosProxy() as data, contextlib.ExitStack() as ending:
        processes = {}
        for role in ROLES:
            arguments = (role, transport, str(seed), str(data.port))
            processes[role] = process = subprocess.Popen(
                (sys.executable, "-m", "tests.transfer.soak.end", *arguments),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=0,  # Ctrl-C in a terminal reaches this process alone
            )
            ending.callback(_end, process)
        try:
            yield Pair(processes, control, data)
        except BaseException:
            for process in processes.values():
                process.kill()  # it may be in the middle of many rooms
            raise


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
