"""The tests that run in ``.venv-vllm`` can be collected there: nothing that they import needs a package it lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLLECT = """
import sys
import pytest
sys.modules["av"] = None  # an import raises ModuleNotFoundError
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "vllm_http", *sys.argv[1:]]))
"""


@pytest.mark.integration
@pytest.mark.sweeps
def test_the_tests_of_vllms_servers_are_collected_without_av() -> None:
    command = [sys.executable, "-c", COLLECT, "tests/serve/vllm", "tests/bench/serving"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
