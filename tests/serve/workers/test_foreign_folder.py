"""A folder that others can write to as the current directory: its files are not run as modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embferry.serve.supervisor import LocalCluster
from tests.serve.workers.test_processes import SETTINGS, ask, image

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

NAMES = (
    "PIL",
    "av",
    "embferry",
    "h2",
    "httpx",
    "json",
    "logging",
    "numpy",
    "starlette",
    "torch",
    "transformers",
    "uvicorn",
)


def test_no_process_runs_files_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "was-run"
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write({name!r} + ' ')\nraise ImportError\n")
    monkeypatch.chdir(tmp_path)
    python = subprocess.run([sys.executable, "-m", "PIL"], capture_output=True, timeout=100, check=False)
    assert (python.returncode, marker.read_text()) == (1, "PIL ")  # what a process would do without protection
    marker.unlink()
    with LocalCluster(SETTINGS, logs=tmp_path / "log") as cluster:
        cluster.wait_ready()
        answer = ask(cluster, image())
        assert answer.status_code == 200, answer.text
    assert not marker.exists(), marker.read_text()
