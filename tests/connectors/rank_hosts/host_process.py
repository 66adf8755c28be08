"""Host 1 as a process of its own, which a test can kill."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec

from embferry.connectors.vllm.config import ConnectorConfig

from .builders import SECRET, There

ROOT = Path(__file__).parents[3]


class HostProcess:
    """Starts the process and waits until it has begun to claim embeddings."""

    def __init__(self, config: ConnectorConfig) -> None:
        given = msgspec.json.encode(config).decode()
        command = [sys.executable, "-m", "tests.connectors.rank_hosts.host_process", given, SECRET]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for end in (self._process.stdin, self._process.stdout):
            assert end is not None
            end.close()


if __name__ == "__main__":
    with closing(There(msgspec.json.decode(sys.argv[1], type=ConnectorConfig), sys.argv[2])):
        print("ready", flush=True)
        sys.stdin.read()
