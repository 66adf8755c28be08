"""The cache that encoders share, with real processes: a worker that was killed finds what it had encoded."""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from embferry.cache.folder import FolderStore
from embferry.serve.config import CacheSettings
from embferry.serve.supervisor import LocalCluster
from tests.serve.workers.joined import DEADLINE
from tests.serve.workers.test_processes import SETTINGS, START, ask, image, long_video, wait, worker

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    cache = CacheSettings(url=f"file://{tmp_path}/cache")
    with LocalCluster(SETTINGS.model_copy(update={"cache": cache}), logs=tmp_path / "log") as running:
        running.wait_ready(START)
        yield running


def counted(cluster: LocalCluster, name: str) -> float:
    """Returns a metric of the encode worker, summed over its labels."""
    text = httpx.get(f"{worker(cluster, 'encode').url}/metrics", timeout=DEADLINE, trust_env=False).text
    lines = [line for line in text.splitlines() if re.match(rf"embferry_encode_{name}[{{ ]", line)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_a_restart_costs_no_encode(cluster: LocalCluster, tmp_path: Path) -> None:
    media = image(), long_video(8)
    first = ask(cluster, *media)
    assert first.status_code == 200, first.text
    assert counted(cluster, "items_encoded_total") == counted(cluster, "shared_cache_misses_total") == 2
    store = FolderStore(tmp_path / "cache", 1 << 30)
    assert stat.S_IMODE(os.stat(tmp_path / "cache").st_mode) == 0o700
    wait(lambda: len(store.files()) == 2, "both are written")
    before = worker(cluster, "encode")
    os.kill(before.pid, signal.SIGKILL)
    wait(
        lambda: worker(cluster, "encode").starts == before.starts + 1 and worker(cluster, "encode").ready,
        "a restart",
        START,
    )
    wait(lambda: ask(cluster, *media).status_code == 200, "an answer of the new worker", START)
    second = ask(cluster, *media)
    assert second.json()["embferry"]["tokens"] == first.json()["embferry"]["tokens"]
    assert second.json()["choices"] == first.json()["choices"]
    assert counted(cluster, "items_encoded_total") == 0
    assert counted(cluster, "shared_cache_hits_total") == 2
    assert counted(cluster, "shared_cache_bytes") > 0
