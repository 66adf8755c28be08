"""A replica with an encode worker or a language worker of this project."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack
from typing import Any

import msgspec
import ray

from embferry.deploy.ray.child import Child
from embferry.deploy.ray.measures import waits_for_answer, waits_for_encoder
from embferry.deploy.ray.names import WorkerRole
from embferry.deploy.ray.replica import Replica
from embferry.serve.bootstrap import bootstrap_server
from embferry.serve.config import Settings
from embferry.serve.http.address import bracketed
from embferry.serve.supervisor.handover import child_program
from embferry.trust.trust import Trust

REGISTER_SECONDS = 10.0
"""For which a new worker is healthy before it has registered, which it does once it accepts requests. With TLS, Serve's
first check comes sooner than that, and a replica that fails it has failed to start."""
REGISTER_POLL_SECONDS = 0.02


class WorkerReplica(Replica):
    """Runs the worker in a process of its own, as ``embferry serve`` does, at the address of the node.

    The replica is the bootstrap server of that one worker: the worker registers here with its id and its addresses, and
    the replica passes them on to Ray.
    """

    def __init__(self, role: WorkerRole, settings: Settings) -> None:
        self._has_registered = False
        host = ray.util.get_node_ip_address()
        bootstrap = settings.bootstrap.model_copy(update={"port": 0})
        own = settings.model_copy(update={"host": host, "advertise_host": None, "bootstrap": bootstrap})
        self.counted = waits_for_encoder if role == "encode" else waits_for_answer
        super().__init__(role, own)

    @property
    def start_seconds(self) -> tuple[float, str]:
        return self.settings.serve.start_timeout, "serve.start_timeout"

    def make_child(self, held: ExitStack) -> Child:
        self._bootstrap = bootstrap_server(self.settings)
        self._bootstrap.start()
        held.callback(self._bootstrap.stop)
        url = f"{Trust.of_environment().scheme}://{bracketed(self.settings.host)}:{self._bootstrap.port}"
        told = self.settings.model_copy(update={"bootstrap_url": url})
        return Child(self.name, self.role, child_program(self.role, self.name, told), self.ended)

    def describe(self) -> dict[str, Any]:
        """Returns the worker with its load. Empty before it has registered, and when it does not renew its lease."""
        return next((msgspec.to_builtins(worker) for worker in self._bootstrap.workers()), {})

    async def check_health(self) -> None:
        await super().check_health()
        deadline = time.monotonic() + (0.0 if self._has_registered else REGISTER_SECONDS)
        while not self.describe():
            if time.monotonic() >= deadline:
                raise RuntimeError(f"{self.name} does not renew its lease")
            await asyncio.sleep(REGISTER_POLL_SECONDS)
        self._has_registered = True

    async def open_requests(self) -> float:
        status, body = await self._get("/ready")
        if status != 200:
            raise ValueError(f"it answers {status}")
        return float(json.loads(body)["load"])
