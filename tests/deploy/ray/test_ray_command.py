"""``embferry serve --on ray``, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from embferry.trust.keys import Key
from tests.deploy.ray.conftest import DEADLINE, START, wait
from tests.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

API_KEY = "a key of the test"


class Serve:
    """The command. ``lines``: what it has written so far."""

    def __init__(self, *flags: str, **environment: str) -> None:
        words = [sys.executable, "-c", "from embferry.cli.main import run; run()", "serve", "--on", "ray", *flags]
        own = {k: v for k, v in os.environ.items() if not k.startswith(("EMBFERRY_", "RAY_"))} | environment
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def found(self, pattern: str) -> list[str]:
        return [found[1] for line in list(self.lines) if (found := re.search(pattern, line))]

    def wait(self) -> int:
        """Waits for the end. Returns the status."""
        status = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """The command on a Ray cluster of its own, with keys in its environment, ready."""
    port = free_port()
    flags = ("--port", str(port), "--start-timeout", str(START), "--transfer-num-blocks", "1")
    keys = {"EMBFERRY_ROUTER_API_KEY": API_KEY, "EMBFERRY_CLUSTER_KEY": Key.new().written()}
    keys["HOME"] = str(tmp_path)  # where Ray puts a token of its own
    running = Serve(*flags, **keys)
    known = [psutil.Process(running.process.pid)]
    try:
        wait(lambda: running.found(r"ready: shapes at (\S+)/v1") or running.process.poll() is not None, "ready", START)
        assert running.process.poll() is None, running.lines
        known += known[0].children(recursive=True)
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.wait()
        psutil.wait_procs(known, DEADLINE)
        left = [process for process in known if process.is_running()]
        for process in left:
            process.kill()
    assert not left


def test_the_shown_command_works_and_ctrl_c_ends_everything(serve: Serve) -> None:
    """The keys of the environment count: the router asks for one, and workers for proofs of the other."""
    (url,) = serve.found(r"ready: shapes at (\S+)/v1")
    (curl,) = serve.found(r": or: (curl .*)")
    assert httpx.get(f"{url}/v1/models", trust_env=False, timeout=DEADLINE).status_code == 401
    environment = {**os.environ, "EMBFERRY_ROUTER_API_KEY": API_KEY, "no_proxy": "*"}
    done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, env=environment, check=False)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "red", shlex.join([curl, done.stderr])
    authorized = {"Authorization": f"Bearer {API_KEY}"}
    pages = httpx.get(f"{url}/workers", headers=authorized, trust_env=False, timeout=DEADLINE).json()
    for worker in pages["workers"]:
        answer = httpx.post(f"{worker['url']}/encode", trust_env=False, timeout=DEADLINE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "proof_required")
    for name in ("encode", "language", "router"):
        assert serve.found(rf"({name}: 1 running)")
    assert not [line for line in serve.lines if API_KEY in line]
    serve.process.send_signal(signal.SIGINT)
    assert serve.wait() == 0, serve.lines
    assert serve.found(r"(everything has ended)")


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    running = Serve("--address", f"127.0.0.1:{free_port()}", "--port", str(free_port()))
    assert running.wait() == 1
    assert [line for line in running.lines if line.startswith("embferry: the Ray cluster at 127.0.0.1:")]
