"""The processes of a deployment on this machine: for commands, for programs and for tests."""

from __future__ import annotations

import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from embferry.serve.config import Settings
from embferry.serve.http.address import get
from embferry.serve.supervisor.ports import Wanted, wanted_router
from embferry.serve.supervisor.process import ClusterError, ProcessRole, ProcessView, Program, SupervisedProcess

POLL_SECONDS = 0.1
"""Between two questions to the router whether it knows all workers."""
ROUTER_SECONDS = 2.0
PROGRESS_SECONDS = 5.0
"""Between two sentences about what is still missing."""
LAST_SHARE = 0.2
"""The part of ``serve.stop_timeout`` that is kept for the processes that end last, however long the others take."""

KILLED_SECONDS = 10.0
"""Seconds for the end of a process that was killed, with what it has started."""


class Cluster(ABC):
    """Supervises processes, each with a thread of its own. A context manager: leaving it ends them all.

    Every process ends with the one that made the cluster, even if that is killed with SIGKILL.
    Every process has the environment of the moment in which the cluster was made, also when it is started again.

    Args:
        settings: of the deployment.
        workers: the workers that the router has to know, by role.
        timeout: the default of :meth:`wait_ready`, in seconds, and the name of the setting.
        logs: a file that the processes' logs are appended to; standard error if None.
        progress: gets one sentence for each process that was started or accepts requests, and now and then about those
            that do not yet. Runs on any thread, possibly with the cluster's lock held, and may not block.

    Attributes:
        title: the name of what is served, for people.
    """

    title = ""

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
        self._environ = dict(os.environ)
        self._output: IO[bytes] | None = None
        self._changed = threading.Condition()  # guards what follows
        self._reported: set[tuple[str, int, bool]] = set()
        self._first: list[SupervisedProcess] = []
        self._others: list[SupervisedProcess] | None = None
        self._stopping = self._interrupted = False

    @abstractmethod
    def first(self) -> list[SupervisedProcess]:
        """Returns the processes that the others need. They are started first and stopped last."""

    @abstractmethod
    def others(self) -> list[SupervisedProcess]:
        """Returns the other processes. Called when all of :meth:`first` accept requests."""

    def wanted_ports(self) -> list[Wanted]:
        """Returns the ports that the processes will listen on, as far as they are known."""
        return [wanted_router(self.settings)]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # an interrupt, when some have been started
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begins to start all processes. :meth:`wait_ready` waits for them."""
        if self._logs is not None:
            self._output = self._logs.open("ab")
        with self._changed:
            self._first = self.first()
            for process in self._first:
                process.start()
        self._on_change()

    @property
    def processes(self) -> tuple[ProcessView, ...]:
        """Every process as it is now."""
        return tuple(process.view for process in self.supervised)

    @property
    def supervised(self) -> list[SupervisedProcess]:
        """The processes that have been started so far."""
        return [*self._first, *(self._others or ())]

    @property
    def workers(self) -> tuple[ProcessView, ...]:
        """The workers among them, which encode or compute answers."""
        return tuple(view for view in self.processes if view.role not in ("bootstrap", "router"))

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
            KeyboardInterrupt: :meth:`interrupt` was called.
        """
        seconds, name = (self._timeout, f" ({self._timeout_name})") if timeout is None else (timeout, "")
        began = told = time.monotonic()
        while (missing := self._missing()) is not None:
            if self._interrupted:
                raise KeyboardInterrupt
            now = time.monotonic()
            if now > began + seconds:
                raise ClusterError(f"not ready within {seconds:g} s{name}: {missing}")
            if now >= told + PROGRESS_SECONDS:
                told = now
                self._progress(f"waiting, {now - began:.0f} of {seconds:g} s: {missing}")
            with self._changed:
                self._changed.wait(POLL_SECONDS)

    def stop(self) -> None:
        """Ends every process in order, within ``serve.stop_timeout``, and returns when none is left. Idempotent.

        An interrupt meanwhile (a second Ctrl-C) kills them at once.
        """
        with self._changed:
            self._stopping = True  # no process is added from now on
        seconds = self.settings.serve.stop_timeout
        deadline = time.monotonic() + seconds
        sooner, later, share = self.ends()
        try:
            self._end(sooner, deadline - share * seconds)
            self._end(later, deadline)
        except BaseException:
            for process in self.supervised:
                process.stop()
                process.kill()
            for process in self.supervised:
                process.join(time.monotonic() + KILLED_SECONDS)
            raise
        finally:
            if self._output is not None:
                self._output.close()

    def interrupt(self) -> None:
        """Ends :meth:`wait_ready`. For a handler of signals: takes no lock."""
        self._interrupted = True

    def kill(self) -> None:
        """Kills all processes; none is started again. For a handler of signals during :meth:`stop`: takes no lock."""
        for process in self.supervised:
            process.kill()

    def ends(self) -> tuple[list[SupervisedProcess], list[SupervisedProcess], float]:
        """Returns the processes to end first, the processes to end next, and the part of the time for the latter."""
        return self._others or [], self._first, LAST_SHARE if self._first else 0

    def _end(self, processes: list[SupervisedProcess], deadline: float) -> None:
        for process in processes:
            process.stop(deadline - time.monotonic())
        for process in processes:
            process.join(deadline)

    # For subclasses

    def process(
        self, name: str, role: ProcessRole, program: Callable[[], Program], on_end: Callable[[], None] = lambda: None
    ) -> SupervisedProcess:
        """Returns a process that reports to this cluster. ``on_end``: as for :class:`SupervisedProcess`."""
        delay = self.settings.serve.restart_delay
        return SupervisedProcess(name, role, program, self._environ, delay, self._output, self._on_change, on_end)

    def _on_change(self) -> None:
        """Runs on a process's thread when it has been started, accepts requests or has ended."""
        with self._changed:
            for view in self.processes:
                state = (view.name, view.pid, view.ready)
                if not view.pid or state in self._reported:
                    continue
                self._reported.add(state)
                what = f"answers at {view.url}" if view.ready else f"is starting (pid {view.pid})"
                self._progress(f"{view.name} {what}")
            if self._others is None and not self._stopping and all(process.first_url for process in self._first):
                self._others = self.others()
                for process in self._others:
                    process.start()
            self._changed.notify_all()

    def _missing(self) -> str | None:
        """Returns why the cluster is not ready yet, or None. Raises ClusterError if it cannot become ready."""
        if failures := [process.failure for process in self.supervised if process.failure]:
            raise ClusterError("; ".join(failures))
        if silent := [view.name for view in self.processes if not view.ready]:
            return f"no answer yet from {', '.join(silent)}"
        if self._others is None:
            return "not all processes have been started yet"
        known = _known_workers(self.url)
        if any(known.get(role, 0) < count for role, count in self._expected.items()):
            counts = (f"{known.get(role, 0)} of {count} {role} workers" for role, count in self._expected.items())
            return f"the router knows {' and '.join(counts)}"
        return None


def _known_workers(url: str) -> dict[str, int]:
    """Returns the number of workers that the router knows, by role; empty while it is not ready."""
    status, body = get(url, "/ready", ROUTER_SECONDS)
    return dict(json.loads(body)["workers"]) if status == 200 else {}
