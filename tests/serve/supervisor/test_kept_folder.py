"""The folder in memory that language workers share: made at the start of a deployment, gone after its end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from embferry.serve.config import LanguageSettings, Settings
from embferry.serve.supervisor import LocalCluster, temporary
from embferry.serve.supervisor.cluster import Cluster
from embferry.serve.supervisor.handover import pack, unpack
from embferry.serve.supervisor.kept_folder import SharedFolder


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(temporary, "MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def folder(memory: Path) -> Iterator[SharedFolder]:
    made = SharedFolder(LanguageSettings())
    made.make()
    yield made
    made.remove()


def test_it_is_closed_to_others_and_removed_with_everything_in_it(folder: SharedFolder, memory: Path) -> None:
    assert folder.path is not None
    assert folder.path.parent == memory
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    (folder.path / "of a killed worker").touch()
    folder.remove()
    folder.remove()
    assert list(memory.iterdir()) == []


def test_the_next_deployment_removes_that_of_a_killed_one(folder: SharedFolder, memory: Path) -> None:
    assert folder.path is not None
    os.utime(folder.path, (1, 1))
    others = [SharedFolder(LanguageSettings()) for _ in range(2)]
    others[0].make()
    assert folder.path.exists()
    os.close(folder._lock)  # as the kernel does when the supervisor is killed
    others[1].make()
    assert not folder.path.exists()
    assert sorted(memory.iterdir()) == sorted(other.path for other in others if other.path)
    folder._lock = os.open(os.devnull, os.O_RDONLY)
    for other in others:
        other.remove()


@pytest.mark.parametrize(
    "settings", [LanguageSettings(kept_bytes=0), LanguageSettings(kept_folder=Path("/elsewhere"))], ids=["off", "given"]
)
def test_none_is_made_unless_it_is_wanted(settings: LanguageSettings, memory: Path) -> None:
    folder = SharedFolder(settings)
    folder.make()
    assert folder.path is None
    assert list(memory.iterdir()) == []
    assert folder.given_to(settings) is settings
    folder.remove()


@pytest.mark.parametrize("what", ["nothing", "a file", "a full one"])
def test_without_such_memory_a_deployment_starts_all_the_same(
    what: str, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what != "a full one":
        monkeypatch.setattr(temporary, "MEMORY", memory / what)
        if what == "a file":
            (memory / what).touch()
    else:

        def refuse(root: Path) -> int:
            raise OSError("no space left")

        monkeypatch.setattr(temporary, "hold", refuse)
    folder = SharedFolder(LanguageSettings())
    folder.make()
    assert folder.path is None
    folder.remove()


def test_language_workers_are_told_and_others_are_not(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "start", lambda self: None)
    with LocalCluster(Settings()) as cluster:
        path = cluster._kept.path
        assert path is not None
        told = [unpack(pack(cluster.settings_of("language", number))) for number in range(2)]
        assert [settings.language.kept_folder for settings in told] == [path, path]
        assert cluster.settings_of("encode").language.kept_folder is None
    assert list(memory.iterdir()) == []
