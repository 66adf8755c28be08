"""Adding a transport takes a folder and a line. This adds the example transport of ``docs/adding-a-transport.md``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 600


def code() -> str:
    """Returns the source of the example transport."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-transport.md").read_text(), re.S)
    (block,) = [block for block in blocks if "class UnixTransport" in block]
    return block


@pytest.mark.integration
@pytest.mark.timeout(2 * SECONDS + 60)
def test_a_folder_and_a_line_add_a_transport(tmp_path: Path) -> None:
    """In a copy of the sources the new transport passes the suite, and a worker can use it."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "transports").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("test_conformance.py"), tmp_path / "tests" / "transports")

    folder = tmp_path / "src" / "embferry" / "transports" / "unix"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "transport.py").write_text(code())
    table = tmp_path / "src" / "embferry" / "transports" / "registry.py"
    before = table.read_text()
    line = '    "tcp": TransportSpec('
    assert line in before
    table.write_text(
        before.replace(line, f'    "unix": TransportSpec("unix", "UnixTransport", listens=False),\n{line}')
    )

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    passed = run("-m", "pytest", "tests/transports", "-k", "TestTransport and unix")
    (own,) = re.findall(r"(\d+) passed", passed)
    assert int(own) > 80, "the suite runs on shared and on private memory"
    program = """
from embferry.serve.worker.transports import *

for transport in make_transports(Settings(transfer={"transports": ["unix", "tcp"]})):
    print(transport.name)
    transport.close()
"""
    assert run("-c", program).split() == ["unix", "tcp"]
