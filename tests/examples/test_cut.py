"""The example of a connection that is cut."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.integration
def test_the_transfer_goes_on_after_each_cut() -> None:
    done = subprocess.run(
        [sys.executable, "examples/cut.py"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    told = [line.rpartition("  ")[2] for line in lines]
    assert told == [*["the connection is cut"] * 3, "every byte is the same"]
    arrived = [int(re.findall(r"([\d,]+) of 4,096", line)[0].replace(",", "")) for line in lines]
    assert arrived == sorted(arrived), "nothing that has arrived is lost"
    assert arrived[-1] == 4096
    assert all(len(line) < 80 for line in lines)
