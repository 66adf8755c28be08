"""A road more takes a folder and a line. ``docs/transports.md`` shows one, and that one is added here."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from embferry.serve.config_roads import ROADS

ROOT = Path(__file__).parents[2]
DISAGGREGATION = ROOT / "src" / "embferry" / "disaggregation"
ABOVE = {"admission", "common", "multimodal_embedding", "multimodal_language", "utils", "wires"}
"""What a road must not know: it has no requests and no queues, and does not own the pool."""
NAME_ROADS = {"wires"}
"""Who chooses between the origin's wire, which is Mooncake's, and ours."""
SECONDS = 100


def code() -> str:
    """The road in the documents."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "transports.md").read_text(), re.S)
    (block,) = [block for block in blocks if "class UnixTransport" in block]
    return block


def floors() -> set[str]:
    """What of ``disaggregation`` has a place in the order of pyproject.toml, and so is no road."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [c["layers"] for c in contracts if c.get("containers") == ["embferry.disaggregation"]]
    return {name.strip(" ()") for layer in layers for name in layer.split("|")}


def parts() -> Iterator[tuple[str, set[str]]]:
    """Each module and folder of ``disaggregation``, and which others it imports from."""
    package = "embferry.disaggregation"
    for part in DISAGGREGATION.iterdir():
        if (part.suffix != ".py" and not (part / "__init__.py").exists()) or part.name == "__init__.py":
            continue
        found: set[str] = set()
        for file in part.rglob("*.py") if part.is_dir() else [part]:
            above = ".".join(file.relative_to(ROOT / "src").parent.parts)
            for node in ast.walk(ast.parse(file.read_text())):
                names: list[str] = []
                if isinstance(node, ast.ImportFrom):
                    module = importlib.util.resolve_name("." * node.level + (node.module or ""), above)
                    names = [f"{module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                found |= {name.split(".")[2] for name in names if name.startswith(f"{package}.")}
        yield part.stem, found - {part.stem}


def test_what_is_on_no_floor_is_a_road_and_roads_know_little() -> None:
    roads = {kind.folder for kind in ROADS.values()} | {"memory"}
    imports = dict(parts())
    assert imports.keys() == floors() | roads, "a road is in the table of roads; anything else has a floor in pyproject"
    for part, known in imports.items():
        if part in roads:
            assert not known & ABOVE, f"{part} is a road: it may know base and protocol, blocks and buffers"
        if part not in NAME_ROADS:
            assert not known & roads, f"{part} works over any road, or is one, so it names none"


@pytest.mark.integration
def test_a_folder_and_a_line_are_all(tmp_path: Path) -> None:
    """In a copy of the source: the new road passes the suite by itself, and a worker has it."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "transports").mkdir(parents=True)
    for name in ("test_conformance.py", "test_adding.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path / "tests" / "transports")

    folder = tmp_path / "src" / "embferry" / "disaggregation" / "unix"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "conn_multimodal.py").write_text(code())
    table = tmp_path / "src" / "embferry" / "serve" / "config_roads.py"
    before = table.read_text()
    line = '    "tcp": RoadKind('
    assert line in before
    table.write_text(before.replace(line, f'    "unix": RoadKind("unix", "UnixTransport", listens=False),\n{line}'))

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    passed = run("-m", "pytest", "tests/transports", "-k", "TestRoad and unix or on_no_floor")
    (own,) = re.findall(r"(\d+) passed", passed)
    assert int(own) > 80, "the suite, on shared and on private memory"
    settings = "Settings(transfer={'transports': ['unix', 'tcp']})"
    program = f"from embferry.serve.worker.roads import *\nfor r in roads({settings}): print(r.name); r.close()"
    assert run("-c", program).split() == ["unix", "tcp"]
