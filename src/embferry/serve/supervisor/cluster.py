"""A whole deployment on this machine, as processes: for ``embferry serve``, for programs and for tests."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Literal
from urllib.parse import urlsplit

from embferry.serve.config import Section, Settings
from embferry.serve.supervisor.handover import settled_child
from embferry.serve.supervisor.slot import ClusterError, ProcessRole, ProcessView, Slot

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
"""Between two looks at whether the router has seen all workers."""
ROUTER_SECONDS = 2.0
KILL_SECONDS = 5.0
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Instead of every address of this machine (RFC 6890)."""


class LocalCluster:
    """Bootstrap server, router, encode and language workers. A context manager: leaving it ends them all.

    Every process ends with the one that made the cluster, even if that is killed with SIGKILL.

    Args:
        settings: ports of 0 are chosen freely; ``bootstrap_url`` is the cluster's own, whatever is set.
        logs: a file that the processes' logs are appended to; standard error if None.
        progress: told in one sentence what has been started or has come up.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        logs: Path | None = None,
        progress: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.settings = settings or Settings()
        self._inner = _within(self.settings)
        self._progress = progress
        self._logs = logs
        self._output: IO[bytes] | None = None
        self._changed = threading.Condition()
        self._urls: dict[str, str] = {}
        self._told: set[tuple[str, int, bool]] = set()
        self._began = time.monotonic()
        self._slots: list[Slot] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begins to start everything; does not wait for it: see :meth:`wait_ready`."""
        self._began = time.monotonic()
        if self._logs is not None:
            self._output = self._logs.open("ab")
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._loop is not None or self._fault is not None)

    @property
    def processes(self) -> tuple[ProcessView, ...]:
        """Every process as it is now."""
        return tuple(slot.view for slot in self._slots)

    @property
    def workers(self) -> tuple[ProcessView, ...]:
        """The encode and language workers among them."""
        return tuple(view for view in self.processes if view.role in ("encode", "language"))

    @property
    def url(self) -> str:
        """Where the router answers; empty until it does."""
        return next((view.url for view in self.processes if view.role == "router"), "")

    @property
    def bootstrap_url(self) -> str:
        """Where the bootstrap server answers; empty until it does."""
        return next((view.url for view in self.processes if view.role == "bootstrap"), "")

    def wait_ready(self, timeout: float | None = None) -> None:
        """Waits until every process answers and the router knows every worker.

        Args:
            timeout: seconds; ``serve.start_timeout`` if None.

        Raises:
            ClusterError: a process ended before it answered, or the time is up.
        """
        seconds = self.settings.serve.start_timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        while (missing := self._missing()) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(f"not ready within {seconds:g} s: {missing}")
            with self._changed:
                self._changed.wait(LOOK_SECONDS)

    def stop(self) -> None:
        """Ends every process in order, within ``serve.stop_timeout``, and returns when none is left. Idempotent. An
        interrupt (a second Ctrl-C) kills them at once.
        """
        if not self._thread.is_alive():
            self._close_output()
            return
        self._tell_to_stop()
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self._call(self._kill_all)
            self._thread.join(KILL_SECONDS)
            raise
        finally:
            self._close_output()

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
        bootstrap = self._slot("bootstrap", "bootstrap", lambda: self._with_port("bootstrap"))
        keeping = [self._keep(bootstrap)]
        starting = asyncio.create_task(self._start_others(bootstrap, keeping))
        await stop.wait()
        starting.cancel()
        seconds = self.settings.serve.stop_timeout
        await asyncio.gather(*(slot.stop(seconds) for slot in self._slots if slot is not bootstrap))
        await bootstrap.stop(seconds)  # last: the others sign off there
        for task in keeping:
            task.cancel()
        await asyncio.gather(starting, *keeping, return_exceptions=True)  # _finished has told of what went wrong

    async def _start_others(self, bootstrap: Slot, keeping: list[asyncio.Task[None]]) -> None:
        """Once the bootstrap server answers: they are told where it is."""
        await bootstrap.answered.wait()
        keeping += [self._keep(slot) for slot in self._others()]

    def _keep(self, slot: Slot) -> asyncio.Task[None]:
        task = asyncio.create_task(slot.keep())
        task.add_done_callback(self._finished)
        return task

    def _others(self) -> list[Slot]:
        serve = self.settings.serve
        return [
            self._slot("router", "router", lambda: self._with_port("router")),
            *(self._worker("encode", number) for number in range(serve.encode_workers)),
            *(self._worker("language", number) for number in range(serve.language_workers)),
        ]

    def _worker(self, role: Literal["encode", "language"], number: int) -> Slot:
        """Several workers with a port that is set take that one and those that follow it."""
        mine: dict[str, Section] = {role: _numbered(getattr(self.settings, role), "port", number)}
        if role == "encode":
            mine["transfer"] = _numbered(self.settings.transfer, "http_port", number)
        return self._slot(f"{role}-{number}", role, lambda: self._joined().model_copy(update=mine))

    def _slot(self, name: str, role: ProcessRole, settings: Callable[[], Settings]) -> Slot:
        delay = self.settings.serve.restart_delay
        slot = Slot(name, role, lambda: settled_child(role, settings()), delay, self._output, self._notice)
        self._slots.append(slot)
        return slot

    def _joined(self) -> Settings:
        """What a worker is told: the settings, with the bootstrap server that there is."""
        return self._inner.model_copy(update={"bootstrap_url": self._urls["bootstrap"]})

    def _with_port(self, section: str) -> Settings:
        """The settings, with the port that the process had before: one that is started again must be found again."""
        settings = self._joined() if self._urls else self._inner
        if section == "router":
            settings = settings.model_copy(
                update={"host": self.settings.host, "advertise_host": self._inner.reachable_host}
            )
        if section not in self._urls:
            return settings
        mine = getattr(settings, section).model_copy(update={"port": urlsplit(self._urls[section]).port})
        return settings.model_copy(update={section: mine})

    def _notice(self) -> None:
        """A process has come, answers, or has gone."""
        seconds = time.monotonic() - self._began
        for view in self.processes:
            if view.url:
                self._urls.setdefault(view.role, view.url)
            seen = (view.name, view.pid, view.ready)
            if not view.pid or seen in self._told:
                continue
            self._told.add(seen)
            what = f"answers at {view.url}" if view.ready else f"is being started (pid {view.pid})"
            self._progress(f"{seconds:5.1f} s  {view.name} {what}")
        with self._changed:
            self._changed.notify_all()

    def _finished(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a process can no longer be supervised; this is a bug", exc_info=error)
            self._fault = error
            self._notice()

    # The caller's thread

    def _missing(self) -> str | None:
        """What keeps the cluster from being ready, or None. Raises ClusterError when it cannot become so."""
        if self._fault is not None:
            raise ClusterError(f"the supervisor has stopped: {self._fault!r}") from self._fault
        if failures := [slot.failure for slot in self._slots if slot.failure]:
            raise ClusterError("; ".join(failures))
        serve = self.settings.serve
        views = self.processes
        if len(views) < 2 + serve.encode_workers + serve.language_workers:
            return "the bootstrap server does not answer yet"
        if silent := [view.name for view in views if not view.ready]:
            return f"no answer yet from {', '.join(silent)}"
        known = _counts(self.url)
        if known.get("encode", 0) < serve.encode_workers or known.get("language", 0) < serve.language_workers:
            return f"the router knows these workers so far: {known}"
        return None

    def _tell_to_stop(self) -> None:
        self._call(lambda: self._stop.set() if self._stop is not None else None)

    def _call(self, what: Callable[[], object]) -> None:
        """Runs ``what`` in the supervisor's loop, which may have ended, but has begun: ``start`` has seen to that."""
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(what)

    def _kill_all(self) -> None:
        for slot in self._slots:
            slot.kill()

    def _close_output(self) -> None:
        if self._output is not None:
            self._output.close()
            self._output = None


def _numbered(section: Section, port: str, number: int) -> Section:
    """The settings of one of several workers."""
    first = getattr(section, port)
    return section.model_copy(update={port: first + number}) if first else section


def _within(settings: Settings) -> Settings:
    """For the processes that only each other have to reach: of a router that listens on every address of the machine,
    they keep to the loopback one.
    """
    host = LOOPBACK.get(settings.host) if settings.advertise_host is None else None
    return settings if host is None else settings.model_copy(update={"host": host})


def _counts(url: str) -> dict[str, int]:
    """Workers the router knows, by role; empty while it is not ready."""
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
