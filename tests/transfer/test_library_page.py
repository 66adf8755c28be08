"""Every snippet of ``docs/library.md`` runs by itself, with names imported from ``embferry`` alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import embferry
import embferry.library

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.integration
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_library_page_runs(snippet: str) -> None:
    assert set(re.findall(r"from (embferry\S*) import", snippet)) == {"embferry"}
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_dir_lists_the_public_names() -> None:
    assert set(embferry.library.__all__) | {"__version__"} <= set(dir(embferry))
