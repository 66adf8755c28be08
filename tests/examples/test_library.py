"""The example of the documentation runs, as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
def test_the_library_example_runs_and_says_what_it_did() -> None:
    done = subprocess.run(
        [sys.executable, "examples/library.py"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    said = re.fullmatch(r"1000 tokens in (\d+) transfers; equal: True\n", done.stdout)
    assert said is not None, done.stdout
    assert int(said[1]) > 1000 / 32


def test_the_page_shows_the_example_as_it_is() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    assert (ROOT / "examples" / "library.py").read_text() in page
