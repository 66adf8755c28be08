"""Runs a long command, shows its progress every few seconds and keeps its output. Standard library only."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

PROGRESS_SECONDS = 5.0
LAST_LINES = 40


class Outcome(NamedTuple):
    returncode: int
    lines: list[str]

    @property
    def tail(self) -> str:
        """The last lines of its output."""
        return "\n".join(self.lines[-LAST_LINES:])


def run_command(command: list[str], env: Mapping[str, str], seconds: float | None = None) -> Outcome:
    """Runs ``command`` to its end.

    Args:
        command: The command and its arguments.
        env: The whole environment.
        seconds: Time after which it is killed; None: never.

    Raises:
        OSError: There is no such command.
    """
    began = said = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        killer = None if seconds is None else threading.Timer(seconds, process.kill)
        if killer is not None:
            killer.start()
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                now = time.monotonic()
                if now - said >= PROGRESS_SECONDS:
                    print(f"  {now - began:3.0f} s  {lines[-1][:100]}", flush=True)
                    said = now
        finally:
            if killer is not None:
                killer.cancel()
    return Outcome(process.returncode, lines)
