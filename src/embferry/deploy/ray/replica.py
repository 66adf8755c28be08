"""The base of all replicas of workers: a process, its health, its work, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

from ray import serve

from embferry.deploy.ray.child import Child
from embferry.deploy.ray.measures import Counted, total
from embferry.deploy.ray.names import WORK, WorkerRole
from embferry.observe.logs import configure
from embferry.serve import security
from embferry.serve.config import Settings
from embferry.serve.http.address import get

log = logging.getLogger(__name__)

PROBE_SECONDS = 10.0
DRAIN_POLL_SECONDS = 0.2
IDLE_PROBES = 2
"""Probes in a row that find no work before a worker ends: a request may be on its way to it."""


class Replica(ABC):
    """A replica of a deployment of workers, which Ray Serve calls.

    The methods run on the event loop that Serve keeps for a replica's own code. Routers do not call a replica: they
    send requests to the HTTP server of its process.

    Args:
        role: of the worker.
        settings: of the deployment.

    Raises:
        ChildError: the worker cannot be started.
    """

    counted: Counted
    health_path = "/ready"
    url = ""
    """The worker's URL; empty before it has started and after it has ended."""

    def __init__(self, role: WorkerRole, settings: Settings) -> None:
        self.role, self.settings = role, settings
        self.name = f"{role}-{serve.get_replica_context().replica_id.unique_id}"
        configure(settings.log_level, settings.log_format, self.name)
        security.apply(settings)
        with contextlib.ExitStack() as held:
            self.child = self.make_child(held)
            self.url = self.child.start(*self.start_seconds)
            self._held = held.pop_all()

    @property
    @abstractmethod
    def start_seconds(self) -> tuple[float, str]:
        """The seconds that the start may take, and the name of their setting."""

    @abstractmethod
    def make_child(self, held: contextlib.ExitStack) -> Child:
        """Returns the process, not started yet.

        Args:
            held: gets what has to be released after the process, also if it cannot be started.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what routers have to know of the worker."""

    def ended(self) -> None:
        """Ends the replica with its process, so that Ray starts another one at once. Runs on a thread."""
        log.error("%s has ended; its replica ends too, and Ray starts another one", self.name)
        logging.shutdown()
        os._exit(1)

    # Called by Ray Serve

    async def introduce(self) -> None:
        """Does next to nothing. A router calls it once, which has Serve keep the router informed of the replicas."""
        log.debug("%s has been introduced to a router", self.name)

    async def check_health(self) -> None:
        """Raises an exception if requests would fail."""
        status, body = await self._get(self.health_path)
        if status != 200:
            raise RuntimeError(f"{self.name} answers {status} at {self.url}{self.health_path}: {body[:1000]!r}")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Returns what Serve passes on to the routers."""
        return await asyncio.to_thread(self.describe)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the work by which Serve scales the deployment; nothing while the worker does not tell."""
        try:
            return {WORK: await self.work()}
        except ValueError as error:
            log.debug("%s does not tell its work: %s", self.name, error)
            return {}

    async def work(self) -> float:
        """Returns the number of requests that run or wait.

        Raises:
            ValueError: the worker does not tell.
        """
        status, page = await self._get("/metrics")
        if status != 200:
            raise ValueError(f"it answers {status}")
        return total(page.decode(), self.counted)

    async def open_requests(self) -> float:
        """Returns the number of requests that have begun and not ended, also those that are no work any more."""
        return await self.work()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Returns what ends the worker, or None if there is none: the constructor has failed, or it has ended.

        Serve calls it once, also after a constructor that has failed, and waits for the result. Python calls it too.
        """
        return self._end() if self.url else None

    async def _end(self) -> None:
        """Waits until the worker has finished what it has begun, and ends it.

        Routers have been told for some time by now that the replica is not there any more.
        """
        deadline = time.monotonic() + self.settings.ray.drain_timeout
        idle = 0
        while idle < IDLE_PROBES and time.monotonic() < deadline:
            try:
                left = await self.open_requests()
            except ValueError:  # it has ended, or does not answer
                left = math.nan
                break
            idle = 0 if left else idle + 1
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        if idle < IDLE_PROBES:
            log.warning("%s is ended with %g unfinished requests", self.name, left)
        await asyncio.to_thread(self.child.stop, self.settings.serve.stop_timeout)
        self._held.close()
        self.url = ""

    async def _get(self, path: str) -> tuple[int, bytes]:
        return await asyncio.to_thread(get, self.url, path, PROBE_SECONDS)
