"""The master of a Mooncake store, as a process of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

GUARD_S = 60.0
HOST = "127.0.0.1"


@contextmanager
def running_master() -> Iterator[str]:
    """Runs a master, and returns its address."""
    command = shutil.which("mooncake_master", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert command is not None, "Mooncake is not installed; run: make setup-engines"
    rpc, metadata, metrics = (free_port() for _ in range(3))
    ports = [f"--rpc_port={rpc}", f"--http_metadata_server_port={metadata}", f"--metrics_port={metrics}"]
    process = subprocess.Popen([command, *ports], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + GUARD_S
        while True:
            try:
                socket.create_connection((HOST, rpc), 1.0).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield f"{HOST}:{rpc}"
    finally:
        process.kill()
        process.wait()
