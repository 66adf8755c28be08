"""A cluster without a key: only this machine reaches it, and it does not start where others could."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from embferry.serve.supervisor import LocalCluster
from tests.serve.workers.test_processes import SETTINGS, START, ask, image
from tests.strangers.kernel import listening_of

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]


@pytest.mark.parametrize("transports", [("tcp", "http"), ("shm",)])
def test_every_listening_socket_of_every_process_is_at_the_loopback(transports: tuple[str, ...]) -> None:
    transfer = SETTINGS.transfer.model_copy(update={"transports": transports})
    with LocalCluster(SETTINGS.model_copy(update={"transfer": transfer})) as cluster:
        cluster.wait_ready()
        assert ask(cluster, image()).status_code == 200
        for view in cluster.processes:
            assert view.pid is not None
            found = listening_of(view.pid)
            assert found, view.name
            assert all(sock.host.is_loopback for sock in found), (view.name, found)


def own_address() -> str:
    """Returns an address of this machine that others can reach, or one that stands for all if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "0.0.0.0"
        return str(sock.getsockname()[0])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "own"])
@pytest.mark.parametrize("verb", ["serve", "router", "encode", "language", "bootstrap"])
def test_no_part_starts_where_strangers_reach_it(verb: str, host: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMBFERRY_")}
    address = own_address() if host == "own" else host
    ended = subprocess.run(
        [sys.executable, "-m", "embferry", verb, "--host", address],
        env=environ, capture_output=True, text=True, timeout=START, check=False,
    )  # fmt: skip
    assert ended.returncode not in (0, None)
    (line,) = [line for line in ended.stderr.splitlines() if line.strip()]
    assert "--insecure" in line
    assert ("EMBFERRY_ROUTER_API_KEY" if verb in ("serve", "router") else "embferry keys new") in line
    assert "Traceback" not in ended.stderr
