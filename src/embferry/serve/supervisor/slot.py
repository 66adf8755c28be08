"""One process that is to be there: started, and started again whenever it dies."""

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
from dataclasses import dataclass
from typing import IO, Literal

log = logging.getLogger(__name__)

ProcessRole = Literal["bootstrap", "router", "encode", "language"]


@dataclass(frozen=True, slots=True)
class Program:
    """What runs in a process: ``words`` for the Python interpreter, and the line it reads first."""

    words: tuple[str, ...]
    hello: bytes


MAX_DELAY_SECONDS = 30.0
STEADY_SECONDS = 30.0
"""A process that lived so long has not died of what the last one died of: the delay begins anew."""


class ClusterError(Exception):
    """The processes cannot be brought up; the message says which, and what it ended with."""


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One process as it is now. ``url``: empty until it answers. ``starts``: 1 for the first process of its name."""

    name: str
    role: ProcessRole
    pid: int
    url: str
    starts: int

    @property
    def ready(self) -> bool:
        return bool(self.url)


class Slot:
    """Lives in one event loop; :attr:`view` may be read from any thread.

    Args:
        program: what runs; asked for at each start. It answers with a line ``{"url": …}`` once it can be used.
        delay: seconds before it is started again; doubled each time, up to MAX_DELAY_SECONDS.
        output: where its standard error goes; ours if None.
        changed: called when the view has changed.
    """

    def __init__(
        self,
        name: str,
        role: ProcessRole,
        program: Callable[[], Program],
        delay: float,
        output: IO[bytes] | None,
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.role = role
        self._program = program
        self._delay = delay
        self._output = output
        self._changed = changed
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self.answered = asyncio.Event()
        self.failure: str | None = None
        """Why it never came up."""
        self.view = ProcessView(name, role, 0, "", 0)

    async def keep(self) -> None:
        """Starts the process, again and again, until :meth:`stop`. A process that ends before it has ever answered is
        not started again: what keeps the first one from coming up keeps the second one from it too.
        """
        delay = self._delay
        while not self._stopping:
            began = time.monotonic()
            status = await self._live()
            if self._stopping:
                return
            lived = time.monotonic() - began
            answered = self.view.ready
            self._show(url="", pid=0)
            if self.view.starts == 1 and not answered:
                self.failure = f"{self.name} ended with {_meaning(status)} before it answered; its log says why"
                self._changed()
                return
            delay = self._delay if lived > STEADY_SECONDS else delay
            log.warning("%s ended with %s; starting it again in %.1f s", self.name, _meaning(status), delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    async def _live(self) -> int:
        """One process from start to end; answers its status."""
        process = await self._start()
        try:
            if process.stdout is not None and (line := await process.stdout.readline()):
                self._show(url=str(json.loads(line)["url"]))
                self.answered.set()
            return await process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        program = self._program()
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, *program.words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, **CHILD_ENVIRONMENT},
            process_group=0,  # Ctrl-C in a terminal reaches the supervisor alone, which ends the others in order
        )
        self._show(pid=process.pid, starts=self.view.starts + 1)
        if process.stdin is not None:
            process.stdin.write(program.hello)
        return process

    async def stop(self, seconds: float) -> None:
        """Asks the process to end; kills it if that takes longer than ``seconds``."""
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
        """From the loop only."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _show(self, *, pid: int | None = None, url: str | None = None, starts: int | None = None) -> None:
        v = self.view
        self.view = ProcessView(
            self.name,
            self.role,
            v.pid if pid is None else pid,
            v.url if url is None else url,
            v.starts if starts is None else starts,
        )
        self._changed()


CHILD_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Models are local files; and a tokenizer's threads would fight with the model's."""


def _meaning(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
