"""The command ``embferry serve --on ray`` as a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.deploy.ray.conftest import DEADLINE, START, wait
from tests.ports import free_port

READY = r"ready: shapes at (\S+)/v1"


class Serve:
    """The command. ``lines``: what it has written so far.

    Args:
        flags: of the command.
        before: words before it, of a program that runs it in its own place.
        environment: more variables.
    """

    def __init__(self, *flags: str, before: Sequence[str] = (), **environment: str) -> None:
        words = [
            *before,
            sys.executable,
            "-c",
            "from embferry.cli.main import run; run()",
            "serve",
            "--on",
            "ray",
            *flags,
        ]
        own = {k: v for k, v in os.environ.items() if not k.startswith(("EMBFERRY_", "RAY_"))} | environment
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def found(self, pattern: str) -> list[str]:
        return [found[1] for line in list(self.lines) if (found := re.search(pattern, line))]

    def wait(self, seconds: float = DEADLINE) -> int:
        """Waits for the end. Returns the status."""
        status = self.process.wait(seconds)
        self._reader.join(DEADLINE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@contextmanager
def served(home: Path, pattern: str, *flags: str, before: Sequence[str] = (), **environment: str) -> Iterator[Serve]:
    """Runs the command on a Ray cluster of its own within the block, from a line with the pattern on.

    Args:
        home: where Ray puts a token of its own.
        pattern: with a group.
        flags: of the command.
        before: words before it.
        environment: more variables of the command.
    """
    own = {"HOME": str(home), "EMBFERRY_SERVE_START_TIMEOUT": str(START), "EMBFERRY_TRANSFER_NUM_BLOCKS": "1"}
    own["EMBFERRY_ROUTER_PORT"] = str(free_port())
    own["EMBFERRY_TRANSFER_TRANSPORTS"] = "shm,tcp"  # others may be installed, and take seconds to load
    running = Serve(*flags, before=before, **own, **environment)
    known = [psutil.Process(running.process.pid)]
    try:
        wait(lambda: running.found(pattern) or running.process.poll() is not None, pattern, START)
        assert running.process.poll() is None, running.lines
        known += known[0].children(recursive=True)
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.wait()
        psutil.wait_procs(known, DEADLINE)
        left = [process for process in known if process.is_running()]
        for process in left:
            process.kill()
    assert not left
