"""Idle connections use up neither the open files of a worker nor its life."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.discovery.leases import Worker
from embferry.serve.http.descriptors import within_open_files
from tests.clock import Clock
from tests.serve.digested import digested
from tests.serve.pictures import png
from tests.serve.workers.joined import DEADLINE
from tests.serve.workers.test_processes import START, wait

OPEN_FILES = 256
CONNECTIONS = 400
LEASE = 3.0
"""Seconds, of which a third passes between two renewals."""
PROGRAM = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({OPEN_FILES}, {OPEN_FILES}))
from embferry.cli.main import run
run()
"""


def test_the_limit_on_connections_is_a_share_of_the_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = [(1024, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    assert within_open_files(4096, 0.5) == 512
    assert within_open_files(100, 0.5) == 100
    assert within_open_files(4096, 0.25) == 256
    assert limits == [(1024, 1024)]
    limits.append((1024, 8192))
    assert within_open_files(5000, 0.5) == 4096
    assert limits[-1] == (8192, 8192)  # raised as far as the system permits


@dataclass
class FewFiles:
    """An encode worker that may open few files, and the bootstrap server at which it is registered.

    Attributes:
        renewals: so far, with the registration.
    """

    process: subprocess.Popen[bytes]
    bootstrap: BootstrapClient
    log: Path
    renewals: int = 0

    @property
    def worker(self) -> Worker | None:
        return next(iter(self.bootstrap.workers()), None)


@pytest.fixture
def few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FewFiles]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("EMBFERRY_", "SGLANG_"))}
    # The server's clock stands still: on a busy machine, a renewal may come late.
    bootstrap = BootstrapServer("127.0.0.1", 0, lease_seconds=LEASE, clock=Clock())
    with bootstrap as server, (tmp_path / "log").open("wb") as log:
        url = f"http://127.0.0.1:{server.port}"
        command = [sys.executable, "-c", PROGRAM, "encode", "--port", "0", "--bootstrap-url", url]
        process = subprocess.Popen(command, stderr=log, env=environment)
        running = FewFiles(process, BootstrapClient(url), tmp_path / "log")
        put = server._table.put

        def renew(worker: Worker, now: float) -> bool:
            running.renewals += 1
            return put(worker, now)

        monkeypatch.setattr(server._table, "put", renew)
        try:
            wait(lambda: running.worker is not None or process.poll() is not None, "a registered worker", START)
            yield running
        finally:
            process.kill()
            process.wait()


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_idle_connections_do_not_end_an_encode_worker(few_files: FewFiles) -> None:
    """At its HTTP port and at its control port it keeps a bounded number, goes on answering and keeps its lease."""
    worker = few_files.worker
    assert worker is not None
    http, control = urlsplit(worker.url), urlsplit(worker.endpoint)
    descriptors = Path(f"/proc/{few_files.process.pid}/fd")
    with ExitStack() as held:
        for address in (http, control):
            for _ in range(CONNECTIONS):
                connection = socket.create_connection((str(address.hostname), int(address.port or 0)), DEADLINE)
                held.enter_context(connection)
        wait(lambda: len(list(descriptors.iterdir())) > 64, "some of the connections accepted")
        for room in range(8):
            body = msgspec.msgpack.encode(
                {"room": room, "request_id": "test", "items": [{"kind": "image", "data": png(64, 64)}]}
            )
            answer = httpx.post(f"{worker.url}/encode", content=body, timeout=DEADLINE, trust_env=False, auth=digested)
            assert answer.status_code == 200, answer.text
            assert httpx.get(f"{worker.url}/health", timeout=DEADLINE, trust_env=False).status_code == 200
        assert len(list(descriptors.iterdir())) < OPEN_FILES
        assert few_files.process.poll() is None
        before = few_files.renewals
        wait(lambda: few_files.renewals > before, "a renewal")
        assert few_files.worker is not None
    assert len(few_files.log.read_text().splitlines()) < 1000
    assert "removed" not in few_files.log.read_text()
