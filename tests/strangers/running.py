"""A running cluster with a key, as its owner sees it, and what it has spent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import msgspec
import psutil

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.leases import Worker
from embferry.serve.http.proofs import ProvedRequests, worker_context
from embferry.serve.supervisor import LocalCluster
from embferry.testing.pair import eventually
from embferry.transfer.control.endpoint import host_and_port
from embferry.trust import Trust
from embferry.trust.digests import CONTENT_DIGEST, content_digest
from tests.serve.digested import digested
from tests.serve.pictures import png
from tests.serve.workers.test_processes import START, ask, image
from tests.strangers.kernel import listening_of

MIB = 1 << 20
MEMORY = 64 * MIB
"""More than the bounds on unfinished connections allow (docs/driver.md, docs/operations.md), of each process."""
UNSPENT = ("_created", "_seconds_count", "_seconds_sum")
"""Ends of metrics that say when something was, not what was spent."""
EXPECTED = (
    "process_", "embferry_process_log_lines",
    "embferry_worker_control_messages", "embferry_worker_data_connections", "embferry_worker_control_connections",
    "embferry_bootstrap_connections", "embferry_bootstrap_evicted", "embferry_bootstrap_timed_out",
)  # fmt: skip
"""Metrics that say that something was refused, or count connections, which are compared by descriptors."""


@dataclass(frozen=True)
class Port:
    """A listening port.

    Attributes:
        kind: "control", "tcp", "http" (the transport), "bootstrap", "router", "encode" or "language".
    """

    kind: str
    number: int
    pid: int

    @property
    def at(self) -> tuple[str, int]:
        return "127.0.0.1", self.number


class Running:
    """A cluster that is ready and has answered a question.

    Attributes:
        ports: Every listening port of every process, by kind.
    """

    def __init__(self, cluster: LocalCluster, trust: Trust) -> None:
        self.cluster, self.trust = cluster, trust
        self.bootstrap = BootstrapClient(cluster.bootstrap_url, trust=trust)
        self.ask()
        self.ports = {port.kind: port for port in self._find_ports()}

    def ask(self) -> None:
        """Asks an honest question."""
        answer = ask(self.cluster, image())
        assert answer.status_code == 200, answer.text

    def worker(self, role: str) -> Worker:
        return self.bootstrap.workers(role)[0]  # type: ignore[arg-type]

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.ports[kind].number}"

    def proved(self, role: str) -> httpx.Client:
        """Returns a client of a worker that knows the key."""
        one = self.worker(role)
        auth = ProvedRequests(self.trust.keys, worker_context(one.id), one.url)
        hooks = {"request": [digested]}
        return httpx.Client(base_url=one.url, auth=auth, timeout=START, trust_env=False, event_hooks=hooks)

    @contextmanager
    def live_room(self) -> Iterator[int]:
        """A room of the encode worker whose embedding waits for a language worker; it must be there at the end."""
        room = int.from_bytes(os.urandom(7), "big")
        items = [{"kind": "image", "data": png(64, 64, "red")}]
        body = msgspec.msgpack.encode({"room": room, "request_id": "honest", "items": items})
        with self.proved("encode") as http:
            made = http.post("/encode", content=body, headers={CONTENT_DIGEST: content_digest(body)})
            assert made.status_code == 200, made.text
            yield room
            assert http.delete(f"/rooms/{room}").status_code in (200, 204)

    @contextmanager
    def untouched(self, *, asking: bool = False) -> Iterator[None]:
        """Checks that nothing is spent meanwhile: no lease, room, block, request, descriptor or memory.

        Args:
            asking: Whether honest questions are asked meanwhile, which count.
        """
        before, leases = self._counted(asking), {one.id for one in self.bootstrap.workers()}
        descriptors, memory = self._descriptors(), self._memory()
        yield
        eventually(lambda: self._counted(asking) == before)
        assert {one.id for one in self.bootstrap.workers()} == leases
        eventually(lambda: all(now <= descriptors[name] for name, now in self._descriptors().items()))
        for name, now in self._memory().items():
            assert now - memory[name] < MEMORY, name

    def _counted(self, asking: bool) -> dict[str, float]:
        """Returns the metrics of all processes but the router, whose clients strangers may be."""
        found = {}
        for view in self.cluster.processes:
            if view.role == "router":
                continue
            for line in httpx.get(f"{view.url}/metrics", timeout=START, trust_env=False).text.splitlines():
                name, _, value = line.rpartition(" ")
                plain = name.partition("{")[0]
                if line.startswith(("#", *EXPECTED)) or plain.endswith(UNSPENT) or "_bucket" in plain:
                    continue
                if not (asking and (plain.endswith("_total") or plain == "embferry_encode_cache_bytes")):
                    found[f"{view.name} {name}"] = float(value)
        assert any("embferry_process_held_bytes" in name for name in found)
        assert any("embferry_language_pool_blocks" in name for name in found)
        return found

    def _descriptors(self) -> dict[str, int]:
        return {view.name: len(os.listdir(f"/proc/{view.pid}/fd")) for view in self.cluster.processes}

    def _memory(self) -> dict[str, int]:
        return {view.name: int(psutil.Process(view.pid).memory_info().rss) for view in self.cluster.processes}

    def _find_ports(self) -> Iterator[Port]:
        control = host_and_port(self.worker("encode").endpoint)[1]
        for view in self.cluster.processes:
            assert view.pid is not None
            main = int(view.url.rpartition(":")[2])
            for sock in listening_of(view.pid):
                kind = {main: view.role, control: "control"}.get(sock.port)
                yield Port(kind or ("http" if view.role == "encode" else "tcp"), sock.port, view.pid)
