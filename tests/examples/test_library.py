"""The example in the documentation is the file that runs, and it works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
def test_the_library_example_transfers_in_many_portions() -> None:
    done = subprocess.run(
        [sys.executable, "examples/library.py"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = re.fullmatch(r"1000 tokens in (\d+) transfers; equal: True\n", done.stdout)
    assert printed is not None, done.stdout
    assert int(printed[1]) > 1000 / 32


def test_the_page_contains_the_example_unchanged() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    assert (ROOT / "examples" / "library.py").read_text() in page
