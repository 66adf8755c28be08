"""The workers as Ray Serve counts them, in the process of a router: they take the place of the bootstrap server's list.

Serve's controller tells every process that has a handle of a deployment which replicas run, and what these tell of
themselves, as soon as that changes. A replica that has died or is being taken away is missing in what it tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Iterable
from typing import Any

import msgspec

from embferry.deploy.ray.names import WorkerRole
from embferry.discovery.leases import Role, WorkerList

POLL_SECONDS = 1.0
"""Between two reads while nothing changes."""


class ReplicaList:
    """The source of a router's list: of workers (:class:`.WorkerSource`), or of instances (:class:`.InstanceSource`).

    Serve writes on a thread of its own, the router reads on its event loop.
    """

    address, stale_seconds = "Ray Serve", math.inf

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[str, tuple[dict[str, Any], ...]] = {}
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, role: WorkerRole, workers: Iterable[dict[str, Any]]) -> None:
        """Replaces the workers of a role. Those that tell nothing yet are left out."""
        told = tuple(worker for worker in workers if worker)
        with self._lock:
            self._told[role] = told
            reader = self._reader
        if reader is not None:
            loop, changed = reader
            with contextlib.suppress(RuntimeError):  # the loop is closed: the router has ended
                loop.call_soon_threadsafe(changed.set)

    async def read(self) -> WorkerList:
        with self._lock:
            told = [worker for workers in self._told.values() for worker in workers]
        return WorkerList(tuple(msgspec.Raw(msgspec.json.encode(worker)) for worker in told))

    def urls(self, role: str) -> list[str]:
        with self._lock:
            return [worker["url"] for worker in self._told.get(role, ())]

    async def wait(self) -> None:
        changed = self._changed()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), POLL_SECONDS)
        changed.clear()  # what comes from here on is read next

    def absence(self, role: Role) -> str:
        return f"no {role} worker runs on Ray yet, or none tells of itself"

    def _changed(self) -> asyncio.Event:
        with self._lock:
            if self._reader is None:
                self._reader = asyncio.get_running_loop(), asyncio.Event()
            return self._reader[1]


REPLICAS = ReplicaList()
"""The list of this process, in which one router runs at most."""
