"""A Ray cluster of three nodes on this machine: one with the router and the language workers, two for encoders."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from embferry.serve.config import (
    RaySettings,
    RouterSettings,
    SecuritySettings,
    ServeSettings,
    Settings,
    TransferSettings,
)
from embferry.serve.http.address import get
from embferry.trust.keys import Key
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.deploy.ray.questions import Question

RAY = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
"""The marks of every test on the cluster. Ray's own code, which runs in this process too, uses what is deprecated."""
START = 300.0
"""Seconds until a start counts as hanging."""
DEADLINE = 120.0
"""Seconds until anything else does."""
STORE = 80 * 2**20
"""Bytes of the object store of a node, of which little is used."""
HEAD, VISION = {"front": 1, "answers": 4}, {"vision": 1}
"""Resources by which the tests place replicas: an encode worker has a node of its own."""


def wait(condition: Callable[[], Any], goal: str, seconds: float = DEADLINE) -> Any:
    """Waits until the condition returns something true, and returns that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{goal}: not within {seconds:g} s"
        time.sleep(0.02)
    return found


class RayCluster:
    """The cluster, with Ray Serve on it.

    Attributes:
        url: of the only proxy, on the first node.
        encoder_nodes: the other nodes.
        settings: of an application on it.
    """

    def __init__(self, key_file: Path) -> None:
        from ray.cluster_utils import Cluster

        first = {"num_cpus": 8, "resources": HEAD, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, connect=True, head_node_args=first)
        self.encoder_nodes = [self.add_node(), self.add_node()]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = Settings(
            router=RouterSettings(request_timeout=START),
            transfer=TransferSettings(num_blocks=1, block_size=2, transports=("tcp",)),
            serve=ServeSettings(start_timeout=START),
            security=SecuritySettings(cluster_key_file=key_file),
            ray=RaySettings(
                router_resources={"front": 1}, encoder_resources={"vision": 1}, language_resources={"answers": 1}
            ),
        )

    def add_node(self) -> Any:
        """Adds a node for one encode worker."""
        return self.cluster.add_node(num_cpus=8, resources=VISION, object_store_memory=STORE)

    def start_serve(self) -> None:
        from ray import serve

        serve.start(http_options={"host": "127.0.0.1", "port": self.port, "location": "HeadOnly"})

    def run(self, settings: Settings) -> None:
        """Runs an application, in place of the one before, until its router knows its workers."""
        from ray import serve

        from embferry.deploy.ray.application import application

        self.start_serve()
        serve.run(application(settings), name="embferry")
        wait(lambda: get(self.url, "/ready", DEADLINE)[0] == 200, "a router that knows workers", START)

    def json(self, path: str) -> Any:
        """Returns what the router tells at a path."""
        status, body = get(self.url, path, DEADLINE)
        assert status in (200, 503), f"status {status} for {path}: {body!r}"
        return json.loads(body)

    def workers(self, role: str) -> list[dict[str, Any]]:
        """Returns the workers of a role that the router knows."""
        return [worker for worker in self.json("/workers")["workers"] if worker["role"] == role]

    def count(self, role: str) -> int:
        """Returns the number of workers of a role that the router knows."""
        return int(self.json("/ready")["workers"][role])

    def total(self, pattern: str) -> float:
        """Returns the sum of those of the router's metrics whose names with labels begin with the pattern."""
        return measured(self.url, pattern)

    def node_of(self, pid: int) -> Any:
        """Returns the node of encoders on which a process runs."""
        return next(node for node in self.encoder_nodes if pid in {one.pid for one in processes(node)})

    def kill_node(self, node: Any) -> None:
        """Kills a node as a power failure does: all of its processes at once, and the children of its replicas."""
        found = processes(node)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.encoder_nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        import ray
        from ray import serve

        try:
            serve.shutdown()
        finally:
            session = self.cluster.head_node.get_session_dir_path()
            ray.shutdown()
            self.cluster.shutdown()
            shutil.rmtree(session, ignore_errors=True)


def processes(node: Any) -> list[psutil.Process]:
    """Returns the processes of a node, with all that they have started."""
    own = [psutil.Process(one.process.pid) for many in node.all_processes.values() for one in many]
    return [*own, *(child for process in own for child in process.children(recursive=True))]


def measured(url: str, pattern: str) -> float:
    """Returns the sum of those metrics of a process whose names with labels begin with the pattern."""
    status, page = get(url, "/metrics", DEADLINE)
    assert status == 200, f"status {status} for the metrics of {url}"
    return sum(float(line.rpartition(" ")[2]) for line in page.decode().splitlines() if re.match(pattern, line))


@pytest.fixture(scope="session")
def key() -> str:
    """The cluster key, as it is written into its file."""
    return Key.new().written()


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """More variables of every node."""
    return {}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, key: str, environment: dict[str, str]) -> Iterator[RayCluster]:
    key_file = tmp_path_factory.mktemp("key") / "key"
    key_file.write_text(key)
    key_file.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment | {"RAY_USAGE_STATS_ENABLED": "0"}).items():
            patch.setenv(name, value)
        running = RayCluster(key_file)
        try:
            yield running
        finally:
            running.close()


@pytest.fixture(scope="session")
def asked(cluster: RayCluster) -> list[Question]:
    """Questions with the answers of one process that has the whole model."""
    from tests.deploy.ray.questions import questions  # not where vLLM is, which lacks what reads videos

    return questions(cluster.settings)
