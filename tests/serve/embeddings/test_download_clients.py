"""curl and wget download an embedding from an encode worker, are cut off, and resume."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from embferry.testing.proxy import ChaosProxy
from tests.serve.embeddings.conftest import OTHER, PICTURE, EncodeWorker

pytestmark = pytest.mark.integration

SECONDS = 60
HEADS = 1500
"""Largest size of a response's head in bytes."""


def run(program: str, *arguments: object) -> int:
    """Runs a program without the user's settings, such as a proxy; returns its exit status."""
    found = shutil.which(program)
    assert found is not None, f"{program} is not installed; the test needs it"
    own = {"curl": ["-q", "-sS"], "wget": ["--no-config", "-q"]}[program]
    environment = {"PATH": os.environ["PATH"]}
    command = [found, *own, *map(str, arguments)]
    return subprocess.run(command, env=environment, timeout=SECONDS, check=False).returncode


@pytest.fixture
def room(worker: EncodeWorker) -> Iterator[int]:
    room = worker.open(PICTURE, OTHER)
    yield room
    worker.http.delete(f"/embeddings/{room}")


@pytest.fixture
def expected(worker: EncodeWorker) -> bytes:
    return worker.expected(PICTURE, OTHER)


def test_curl_resumes_a_cut_download(worker: EncodeWorker, room: int, expected: bytes, tmp_path: Path) -> None:
    file, heads = tmp_path / "embedding", tmp_path / "heads"
    with ChaosProxy(worker.port, cut_after=len(expected) // 2 + 3) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/embeddings/{room}"
        assert run("curl", "-o", file, url) == 18, "partial file"
        have = file.read_bytes()
        assert 0 < len(have) < len(expected)
        assert expected.startswith(have)
        assert run("curl", "-C", "-", "-D", heads, "-o", file, url) == 0
        assert proxy.cuts == 1
        assert sum(proxy.to_clients) < len(expected) + 2 * HEADS, "received bytes were sent again"
    assert file.read_bytes() == expected
    said = heads.read_text()
    assert said.startswith("HTTP/1.1 206 ")
    assert f"content-range: bytes {len(have)}-{len(expected) - 1}/{len(expected)}" in said.lower()


def test_curl_resumes_after_every_cut(worker: EncodeWorker, room: int, expected: bytes, tmp_path: Path) -> None:
    file, times = tmp_path / "embedding", 7
    with ChaosProxy(worker.port, cut_after=len(expected) // 10 + HEADS, times=times) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/embeddings/{room}"
        statuses = [run("curl", "-C", "-", "-o", file, url) for _ in range(times + 1)]
        assert statuses == [18] * times + [0]
        assert sum(proxy.to_clients) < len(expected) + (times + 1) * HEADS
    assert file.read_bytes() == expected


def test_wget_resumes_a_cut_download(worker: EncodeWorker, room: int, expected: bytes, tmp_path: Path) -> None:
    file = tmp_path / "embedding"
    with ChaosProxy(worker.port, cut_after=len(expected) // 2 + 3) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/embeddings/{room}"
        assert run("wget", "--tries=1", "-O", file, url) == 4, "network failure"
        have = file.read_bytes()
        assert 0 < len(have) < len(expected)
        assert expected.startswith(have)
        assert run("wget", "--tries=1", "-c", "-O", file, url) == 0
        assert proxy.cuts == 1
        assert sum(proxy.to_clients) < len(expected) + 2 * HEADS, "received bytes were sent again"
    assert file.read_bytes() == expected


def test_wget_resumes_without_being_restarted(worker: EncodeWorker, room: int, expected: bytes, tmp_path: Path) -> None:
    file, times = tmp_path / "embedding", 2
    with ChaosProxy(worker.port, cut_after=len(expected) // 4 + HEADS, times=times) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/embeddings/{room}"
        assert run("wget", "--tries=5", "--waitretry=0", "-O", file, url) == 0
        assert proxy.cuts == times
        assert sum(proxy.to_clients) < len(expected) + (times + 1) * HEADS
    assert file.read_bytes() == expected


def test_a_complete_file_is_not_downloaded_again(
    worker: EncodeWorker, room: int, expected: bytes, tmp_path: Path
) -> None:
    """Both programs ask for the bytes after the last one, and accept the 416 with the length."""
    file = tmp_path / "embedding"
    file.write_bytes(expected)
    with ChaosProxy(worker.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/embeddings/{room}"
        assert run("curl", "-C", "-", "-o", file, url) == 0
        assert run("wget", "-c", "-O", file, url) == 0
        assert sum(proxy.to_clients) < 2 * HEADS
    assert file.read_bytes() == expected


def test_a_part_of_another_embedding_is_not_resumed(
    worker: EncodeWorker, room: int, expected: bytes, tmp_path: Path
) -> None:
    """With another ETag the client gets the whole embedding, which curl refuses to append."""
    file, url = tmp_path / "embedding", f"http://127.0.0.1:{worker.port}/embeddings/{room}"
    file.write_bytes(b"other")
    assert run("curl", "-C", "-", "-H", 'If-Range: "other"', "-o", file, url) == 33, "range error"
    assert file.read_bytes() == b"other"
    etag = worker.http.head(f"/embeddings/{room}").headers["etag"]
    file.write_bytes(expected[:5])
    assert run("curl", "-C", "-", "-H", f"If-Range: {etag}", "-o", file, url) == 0
    assert file.read_bytes() == expected
