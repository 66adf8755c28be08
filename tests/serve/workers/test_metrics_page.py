"""The page of metrics, against what real processes serve."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from embferry.serve.config import CacheSettings
from embferry.serve.supervisor import LocalCluster
from tests.serve.workers.joined import DEADLINE
from tests.serve.workers.test_processes import SETTINGS, START, ask, image, worker

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \|", re.MULTILINE)
TYPE = re.compile(r"^# TYPE (\w+) (\w+)$", re.MULTILINE)


def documented(title: str) -> dict[str, str]:
    """Returns the type of each metric in a section of the page."""
    (section,) = re.findall(rf"^## {title}, at[^\n]*\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return dict(ROW.findall(section))


def served(url: str) -> dict[str, str]:
    """Returns the type of each metric of this project that a process serves.

    Prometheus' client adds the time at which each was made, and those of the process, ``process_…``.
    """
    found = TYPE.findall(httpx.get(f"{url}/metrics", timeout=DEADLINE, trust_env=False).text)
    return {name: kind for name, kind in found if name.startswith("embferry_") and not name.endswith("_created")}


def test_processes_serve_what_the_page_documents(tmp_path: Path) -> None:
    cache = CacheSettings(url=f"file://{tmp_path}/cache")
    with LocalCluster(SETTINGS.model_copy(update={"cache": cache}), logs=tmp_path / "log") as cluster:
        cluster.wait_ready(START)
        assert ask(cluster, image()).status_code == 200
        urls = {
            "Router before workers of this project": cluster.url,
            "Encode worker": worker(cluster, "encode").url,
            "Language worker": worker(cluster, "language").url,
            "Bootstrap server": cluster.bootstrap_url,
        }
        for title, url in urls.items():
            assert served(url) == documented(title), title
        for title in ("Router before workers of this project", "Encode worker", "Language worker"):
            text = httpx.get(f"{urls[title]}/metrics", timeout=DEADLINE, trust_env=False).text
            assert "\nprocess_resident_memory_bytes " in text
