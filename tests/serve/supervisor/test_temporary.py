"""Temporary folders of the instances of vLLM: short, removed by their last process, and by the next supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embferry.serve.supervisor import temporary

HOLDER = "import sys; from pathlib import Path; from embferry.serve.supervisor.temporary import hold; "
HOLDER += "hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files, whose path is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", folder)
        yield Path(folder)


def aged(root: Path) -> None:
    os.utime(root, (1, 1))


@pytest.mark.parametrize("more", ["", "x" * 100])
def test_a_socket_fits_into_the_folder_of_an_instance(more: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if more:
        (place / more).mkdir()
        for name in ("VLLM_RPC_BASE_PATH", "TMPDIR"):
            monkeypatch.setenv(name, str(place / more))
        monkeypatch.setattr(tempfile, "tempdir", str(place / more))
    root = temporary.new_root()
    assert root.parent == (Path("/tmp") if more else place)
    assert len(str(root / "language-99" / "00000000-0000-0000-0000-000000000000")) < 108
    assert not root.exists()


def test_the_last_process_removes_the_folder(place: Path) -> None:
    root = temporary.new_root()
    supervisor, child = temporary.hold(root), temporary.hold(root)
    (root / "encode-0").mkdir()
    (root / "encode-0" / "socket").touch()
    temporary.release(root, supervisor)
    assert root.exists()
    temporary.remove(root / "encode-0")
    temporary.release(root, child)
    assert not root.exists()


def test_the_next_supervisor_removes_what_killed_processes_have_left(place: Path) -> None:
    root = temporary.new_root()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    holder.stdout.readline()
    (root / "encode-0").mkdir()
    aged(root)
    temporary.remove_abandoned(temporary.new_root())
    assert root.exists()
    holder.kill()
    holder.communicate()
    temporary.remove_abandoned(temporary.new_root())
    assert not root.exists()


def test_other_folders_are_left_alone(place: Path) -> None:
    young, strange = temporary.new_root(), place / f"{temporary.PREFIX}of-a-user"
    unlocked, link = place / f"{temporary.PREFIX}00000000", place / f"{temporary.PREFIX}00000001"
    os.close(temporary.hold(young))
    os.close(temporary.hold(strange))
    unlocked.mkdir()
    link.symlink_to(strange)
    for folder in (strange, unlocked):
        aged(folder)
    os.utime(link, (1, 1), follow_symlinks=False)
    temporary.remove_abandoned(temporary.new_root())
    assert sorted(place.iterdir()) == sorted([young, strange, unlocked, link])


def test_caches_outlive_an_instance(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    told = temporary.environ(place / "encode-0")
    assert told["TMPDIR"] == told["VLLM_RPC_BASE_PATH"] == str(place / "encode-0")
    assert Path(told["TORCHINDUCTOR_CACHE_DIR"]).parent == Path(tempfile.gettempdir())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/my/cache")
    assert temporary.environ(place)["TORCHINDUCTOR_CACHE_DIR"] == "/my/cache"
