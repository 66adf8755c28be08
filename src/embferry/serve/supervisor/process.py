"""One supervised process: started, and started again whenever it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import IO, Literal

from embferry.observe.logs import log_fd

log = logging.getLogger(__name__)

ProcessRole = Literal["bootstrap", "router", "encode", "language", "prefill", "decode"]

MAX_DELAY_SECONDS = 30.0
STEADY_SECONDS = 30.0
"""After a life this long, the next restart has the first delay again: the cause must be another one."""
OFFLINE = "HF_HUB_OFFLINE"
"""The variable that keeps libraries from the Hugging Face Hub."""
CHILD_ENVIRONMENT = {OFFLINE: "1", "TOKENIZERS_PARALLELISM": "false"}
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
    """One process, which a thread of its own starts again whenever it ends. Any thread may call the methods.

    Args:
        name: for logs.
        role: for the view.
        program: called at each start.
        environ: the environment of the process, at each start.
        delay: seconds before it is started again; doubled each time, up to MAX_DELAY_SECONDS.
        output: where its standard error goes; ours if None.
        on_change: called on the thread when the view has changed.
        on_end: called on the thread when the process has ended, before it is started again.

    Attributes:
        first_url: where it accepted requests for the first time; empty until then.
        failure: why it never came up.
    """

    def __init__(
        self,
        name: str,
        role: ProcessRole,
        program: Callable[[], Program],
        environ: Mapping[str, str],
        delay: float,
        output: IO[bytes] | None,
        on_change: Callable[[], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self._program, self._delay, self._output = name, program, delay, output
        self._on_change, self._on_end = on_change, on_end
        self._environ = {**environ, **CHILD_ENVIRONMENT}
        self.first_url = ""
        self.failure: str | None = None
        self.view = ProcessView(name, role)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._is_killed = False
        self._lock = threading.Lock()  # held while a process is started, so that stop() misses none
        self._thread = threading.Thread(target=self._run, name=f"supervisor-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float | None = None) -> None:
        """Asks the process to end; :meth:`join` waits for that. Does nothing the second time.

        Args:
            seconds: the time for that, which the process is told.
        """
        with self._lock:
            if not self._stopping.is_set() and self._process is not None:
                if seconds is not None and self._process.stdin is not None:
                    with contextlib.suppress(OSError, ValueError):  # it has ended already
                        self._process.stdin.write(f"{seconds:.3f}\n".encode())
                self._process.terminate()
            self._stopping.set()

    def join(self, deadline: float) -> None:
        """Waits for the end of the process, and kills it at ``deadline``, in monotonic seconds."""
        if self._thread.ident is None:  # it was never started
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("%s has not ended in time and is killed", self.name)
            self.kill()
            self._thread.join()

    def kill(self) -> None:
        """Kills the process, if it runs. It is not started again. Takes no lock."""
        self._is_killed = True
        if self._process is not None:
            self._process.kill()

    def pid(self) -> int:
        """Returns the number of the last process, also when it has ended; 0 if there was none."""
        with self._lock:
            return 0 if self._process is None else self._process.pid

    def _run(self) -> None:
        try:
            self._keep()
        except Exception as error:
            log.critical("%s can no longer be supervised; this is a bug", self.name, exc_info=error)
            self.failure = f"{self.name} can no longer be supervised: {error!r}"
            self._on_change()

    def _keep(self) -> None:
        """Starts the process again and again until :meth:`stop`.

        A process that ends before it has ever accepted requests is not started again: the cause would stop the second
        one too.
        """
        delay = self._delay
        while (process := self._start()) is not None:
            began = time.monotonic()
            with process:
                self._show(replace(self.view, pid=process.pid, starts=self.view.starts + 1))
                assert process.stdout is not None
                told = json.loads(process.stdout.readline() or "{}")
                if url := told.get("url"):
                    self.first_url = self.first_url or url
                    self._show(replace(self.view, url=url))
                status = process.wait()
            self._on_end()
            reason = told.get("failure")
            self._show(replace(self.view, url="", pid=0))
            if self._stopping.is_set() or self._is_killed:
                return
            if not self.first_url:
                why = f"{self.name} ended with {_meaning(status)} before it answered; {_advice(status)}"
                self.failure = f"{self.name} cannot start: {reason}" if reason else why
                self._on_change()
                return
            delay = self._delay if time.monotonic() - began > STEADY_SECONDS else delay
            why = f"cannot start: {reason}" if reason else f"ended with {_meaning(status)}"
            log.warning("%s %s; starting it again in %.1f s", self.name, why, delay)
            self._stopping.wait(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    def _start(self) -> subprocess.Popen[bytes] | None:
        """Returns a new process, or None after :meth:`stop`."""
        with self._lock:
            if self._stopping.is_set() or self._is_killed:
                return None
            program = self._program()
            self._process = process = subprocess.Popen(
                (sys.executable, "-P", *program.arguments),  # no module of the current directory
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._output or log_fd(),
                env=self._environ,
                process_group=0,  # Ctrl-C in a terminal reaches the supervisor alone, which ends the others in order
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(program.first_line)
        return process

    def _show(self, view: ProcessView) -> None:
        self.view = view
        self._on_change()


def _meaning(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _advice(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the kernel does this to a process when memory is exhausted; see dmesg"
    return "its log says why"
