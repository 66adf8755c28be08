from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    """The path of a folder in memory."""
    parent = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield parent / "kept"
    shutil.rmtree(parent)
