"""One supervised process: started, and started again whenever it dies."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, Literal

log = logging.getLogger(__name__)

ProcessRole = Literal["bootstrap", "router", "encode", "language"]

MAX_DELAY_SECONDS = 30.0
STEADY_SECONDS = 30.0
"""After a life this long, the next restart has the first delay again: the cause must be another one."""
CHILD_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Models are local files, and a tokenizer's threads would compete with the model's."""


class ClusterError(Exception):
    """The processes cannot be brought up; the message says which one, and why."""


@dataclass(frozen=True, slots=True)
class Program:
    """The program of a process. ``arguments``: for the Python interpreter. ``first_line``: on its standard input."""

    arguments: tuple[str, ...]
    first_line: bytes


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One process as it is now.

    Attributes:
        pid: 0 while it does not run.
        url: empty until it accepts requests.
        starts: 1 for the first process of its name.
    """

    name: str
    role: ProcessRole
    pid: int = 0
    url: str = ""
    starts: int = 0

    @property
    def ready(self) -> bool:
        """Whether it accepts requests."""
        return bool(self.url)


class SupervisedProcess:
    """Belongs to one event loop; :attr:`view` may be read from any thread.

    Args:
        name: for logs.
        role: for the view.
        program: called at each start.
        delay: seconds before it is started again; doubled each time, up to MAX_DELAY_SECONDS.
        output: where its standard error goes; ours if None.
        on_change: called in the event loop when the view has changed.

    Attributes:
        answered: set when it has accepted requests for the first time.
        failure: why it never came up.
    """

    def __init__(
        self,
        name: str,
        role: ProcessRole,
        program: Callable[[], Program],
        delay: float,
        output: IO[bytes] | None,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.program = program
        self._delay = delay
        self._output = output
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self.answered = asyncio.Event()
        self.failure: str | None = None
        self.view = ProcessView(name, role)

    async def keep(self) -> None:
        """Starts the process again and again until :meth:`stop`.

        A process that ends before it has ever accepted requests is not started again: the cause would stop the second
        one too.
        """
        delay = self._delay
        while not self._stopping:
            began = time.monotonic()
            status = await self._run()
            if self._stopping:
                return
            lived = time.monotonic() - began
            answered = self.view.ready
            self._show(replace(self.view, url="", pid=0))
            if self.view.starts == 1 and not answered:
                self.failure = f"{self.name} ended with {_meaning(status)} before it answered; its log says why"
                self._on_change()
                return
            delay = self._delay if lived > STEADY_SECONDS else delay
            log.warning("%s ended with %s; starting it again in %.1f s", self.name, _meaning(status), delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    async def _run(self) -> int:
        """Runs one process to its end; returns its status."""
        process = await self._start()
        try:
            if process.stdout is not None and (line := await process.stdout.readline()):
                self._show(replace(self.view, url=str(json.loads(line)["url"])))
                self.answered.set()
            return await process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        program = self.program()
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, *program.arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, **CHILD_ENVIRONMENT},
            process_group=0,  # Ctrl-C in a terminal reaches the supervisor alone, which ends the others in order
        )
        self._show(replace(self.view, pid=process.pid, starts=self.view.starts + 1))
        if process.stdin is not None:
            process.stdin.write(program.first_line)
        return process

    async def stop(self, seconds: float) -> None:
        """Asks the process to end, and kills it if that takes longer than ``seconds``."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            log.warning("%s has not ended within %g s and is killed", self.name, seconds)
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """Kills the process, if it runs. Called in the event loop."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _show(self, view: ProcessView) -> None:
        self.view = view
        self._on_change()


def _meaning(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
