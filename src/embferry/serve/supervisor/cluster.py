"""The processes of a deployment on this machine: for commands, for programs and for tests."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

from embferry.serve.config import Settings
from embferry.serve.supervisor.process import ClusterError, ProcessRole, ProcessView, Program, SupervisedProcess

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""Between two questions to the router whether it knows all workers."""
ROUTER_SECONDS = 2.0
KILL_SECONDS = 5.0


class Cluster(ABC):
    """Supervises processes in a thread of its own. A context manager: leaving it ends them all.

    Every process ends with the one that made the cluster, even if that is killed with SIGKILL.

    Args:
        settings: of the deployment.
        workers: the workers that the router has to know, by role.
        timeout: the default of :meth:`wait_ready`, in seconds, and the name of the setting.
        logs: a file that the processes' logs are appended to; standard error if None.
        progress: gets one sentence for each process that was started or accepts requests. Runs in the supervisor's
            thread and may not block.

    Attributes:
        title: the name of what is served, for people.
        kills_on_interrupt: a second Ctrl-C kills the processes.
    """

    title = ""
    kills_on_interrupt = True

    def __init__(
        self,
        settings: Settings,
        workers: dict[str, int],
        timeout: tuple[float, str],
        *,
        logs: Path | None = None,
        progress: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.settings = settings
        self._expected = workers
        self._timeout, self._timeout_name = timeout
        self._progress = progress
        self._logs = logs
        self._output: IO[bytes] | None = None
        self._changed = threading.Condition()
        self._reported: set[tuple[str, int, bool]] = set()
        self._began = time.monotonic()
        self._processes: list[SupervisedProcess] = []
        self._all_added = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    @abstractmethod
    def first(self) -> list[SupervisedProcess]:
        """Returns the processes that the others need. They are started first and stopped last."""

    @abstractmethod
    def others(self) -> list[SupervisedProcess]:
        """Returns the other processes. Called when all of :meth:`first` accept requests."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begins to start all processes. :meth:`wait_ready` waits for them."""
        self._began = time.monotonic()
        if self._logs is not None:
            self._output = self._logs.open("ab")
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._loop is not None or self._fault is not None)

    @property
    def processes(self) -> tuple[ProcessView, ...]:
        """Every process as it is now."""
        return tuple(process.view for process in self._processes)

    @property
    def workers(self) -> tuple[ProcessView, ...]:
        """The encode and language workers among them."""
        return tuple(view for view in self.processes if view.role in ("encode", "language"))

    @property
    def url(self) -> str:
        """The router's URL; empty until it accepts requests."""
        return self.url_of("router")

    def url_of(self, role: ProcessRole) -> str:
        """Returns the URL of a process with this role; empty until one accepts requests."""
        return next((view.url for view in self.processes if view.role == role and view.url), "")

    def wait_ready(self, timeout: float | None = None) -> None:
        """Waits until every process accepts requests and the router knows every worker.

        Args:
            timeout: in seconds; the setting's if None.

        Raises:
            ClusterError: a process ended before it accepted requests, or the time is over.
        """
        seconds, name = (self._timeout, f" ({self._timeout_name})") if timeout is None else (timeout, "")
        deadline = time.monotonic() + seconds
        while (missing := self._missing()) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(f"not ready within {seconds:g} s{name}: {missing}")
            with self._changed:
                self._changed.wait(POLL_SECONDS)

    def stop(self) -> None:
        """Ends every process in order, within ``serve.stop_timeout``, and returns when none is left. Idempotent.

        An interrupt meanwhile (a second Ctrl-C) kills them at once, if ``kills_on_interrupt``.
        """
        self._call(lambda: self._stop.set() if self._stop is not None else None)
        try:
            while self._thread.is_alive():
                self._join()
        finally:
            if self._output is not None:
                self._output.close()

    def _join(self) -> None:
        try:
            self._thread.join()
        except KeyboardInterrupt:
            if self.kills_on_interrupt:
                self._call(self._kill_all)
                self._thread.join(KILL_SECONDS)
                raise

    # For subclasses

    def process(self, name: str, role: ProcessRole, program: Callable[[], Program]) -> SupervisedProcess:
        """Returns a process that reports to this cluster."""
        return SupervisedProcess(name, role, program, self.settings.serve.restart_delay, self._output, self.on_change)

    def on_change(self) -> None:
        """Runs in the supervisor's thread when a process has been started, accepts requests or has ended."""
        seconds = time.monotonic() - self._began
        for view in self.processes:
            state = (view.name, view.pid, view.ready)
            if not view.pid or state in self._reported:
                continue
            self._reported.add(state)
            what = f"answers at {view.url}" if view.ready else f"is starting (pid {view.pid})"
            self._progress(f"{seconds:5.1f} s  {view.name} {what}")
        with self._changed:
            self._changed.notify_all()

    # The supervisor's thread

    def _run(self) -> None:
        try:
            asyncio.run(self._supervise())
        except Exception as error:
            log.critical("the supervisor has stopped; this is a bug", exc_info=error)
            with self._changed:
                self._fault = error
                self._changed.notify_all()

    async def _supervise(self) -> None:
        stop = asyncio.Event()
        with self._changed:
            self._loop, self._stop = asyncio.get_running_loop(), stop
            self._changed.notify_all()
        first = self.first()
        keeping = [self._keep(process) for process in first]
        starting = asyncio.create_task(self._start_others(first, keeping))
        starting.add_done_callback(self._check)
        await stop.wait()
        starting.cancel()
        seconds = self.settings.serve.stop_timeout
        await asyncio.gather(*(process.stop(seconds) for process in self._processes if process not in first))
        await asyncio.gather(*(process.stop(seconds) for process in first))
        for task in keeping:
            task.cancel()
        await asyncio.gather(starting, *keeping, return_exceptions=True)  # _check has logged their exceptions

    async def _start_others(self, first: list[SupervisedProcess], keeping: list[asyncio.Task[None]]) -> None:
        for process in first:
            await process.answered.wait()
        keeping += [self._keep(process) for process in self.others()]
        self._all_added = True

    def _keep(self, process: SupervisedProcess) -> asyncio.Task[None]:
        self._processes.append(process)
        task = asyncio.create_task(process.keep())
        task.add_done_callback(self._check)
        return task

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a process can no longer be supervised; this is a bug", exc_info=error)
            self._fault = error
            self.on_change()

    def _kill_all(self) -> None:
        for process in self._processes:
            process.kill()

    # The caller's thread

    def _missing(self) -> str | None:
        """Returns why the cluster is not ready yet, or None. Raises ClusterError if it cannot become ready."""
        if self._fault is not None:
            raise ClusterError(f"the supervisor has stopped: {self._fault!r}") from self._fault
        if failures := [process.failure for process in self._processes if process.failure]:
            raise ClusterError("; ".join(failures))
        if silent := [view.name for view in self.processes if not view.ready]:
            return f"no answer yet from {', '.join(silent)}"
        if not self._all_added:
            return "not all processes have been started yet"
        known = _known_workers(self.url)
        if any(known.get(role, 0) < count for role, count in self._expected.items()):
            return f"the router knows {known or 'no workers'} of {self._expected}"
        return None

    def _call(self, action: Callable[[], object]) -> None:
        """Calls ``action`` in the supervisor's event loop, unless that has ended."""
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(action)


def _known_workers(url: str) -> dict[str, int]:
    """Returns the number of workers that the router knows, by role; empty while it is not ready."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=ROUTER_SECONDS)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        body = json.loads(response.read())
        return dict(body["workers"]) if response.status == 200 else {}
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return {}
    finally:
        connection.close()
