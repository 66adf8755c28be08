"""Several processes on one folder: they evict each other's files, are killed while they write, find damaged files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from embferry.cache.folder import FolderStore

from .churn import NAMES, TOKENS
from .samples import file_bytes, has, keep, path_of

pytestmark = pytest.mark.integration

BOUND = 12 * file_bytes(0, TOKENS)
"""Room for less than a third of what the processes write."""
KILLS, DAMAGES = 8, 200


class Churn:
    def __init__(self, folder: Path, seed: int) -> None:
        command = [sys.executable, "-m", "tests.cache.churn", str(folder), str(seed), str(BOUND)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"begun\n"

    def end(self) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.process.stdin, self.process.stdout as out:
            self.process.stdin.close()
            last = out.read()
        assert self.process.wait() == 0
        seen: dict[str, int] = json.loads(last)
        return seen

    def kill(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def started(folder: Path) -> Iterator[list[Churn]]:
    made = [Churn(folder, seed) for seed in range(2)]
    yield made
    for each in made:
        each.kill()


def test_two_processes_that_evict_each_other_s_files(folder: Path, started: list[Churn]) -> None:
    """One is killed again and again, and files are damaged meanwhile. No process reads a wrong embedding or fails."""
    chance = random.Random(0)
    for number in range(KILLS):
        for _ in range(DAMAGES // KILLS):
            path = path_of(folder, chance.randrange(NAMES))
            with suppress(FileNotFoundError):
                if chance.random() < 0.5:
                    os.truncate(path, chance.randrange(file_bytes(0, TOKENS)))
                else:
                    _flip(path, chance.randrange(file_bytes(0, TOKENS) - 1000) + 1000)
            _wait_for_a_change(folder)
        started[1].kill()
        started[1] = Churn(folder, 100 + number)
    seen = [each.end() for each in started]
    assert seen[0]["written"] > NAMES
    assert seen[0]["hits"] > 0
    assert seen[0]["damaged"] > 0
    store = FolderStore(folder, BOUND)
    keep(store, "last", TOKENS)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= BOUND
    assert has(store, "last", TOKENS)


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        if byte:
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))


def _wait_for_a_change(folder: Path) -> None:
    """Waits until a process has written or removed a file."""
    before = folder.stat().st_mtime_ns
    while folder.stat().st_mtime_ns == before:
        pass
