"""``embferry keys``, and starts that fail because strangers could come."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embferry.cli.main import app
from embferry.trust import ClusterKeys

HOSTS = ("--host", "0.0.0.0", "--advertise-host", "10.0.0.7")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts without any, has what the commands change put back, and leaves the log alone."""
    monkeypatch.setattr("embferry.cli.options.configure", lambda *_: None)
    for name in ("EMBFERRY_CLUSTER_KEY", "EMBFERRY_CLUSTER_KEY_FILE", "EMBFERRY_INSECURE"):
        monkeypatch.setenv(name, "")


def called(*words: str) -> tuple[int, str]:
    """Returns the status of a command, and everything that it says."""
    result = CliRunner().invoke(app, words)
    return result.exit_code, result.output


def test_a_new_key_is_printed_or_written(tmp_path: Path) -> None:
    status, text = called("keys", "new")
    assert status == 0
    ClusterKeys.of_text(text.strip())
    file = tmp_path / "key"
    assert called("keys", "new", str(file))[0] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(ClusterKeys.of_file(file).accepted()) == 1


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "key"
    called("keys", "new", str(file))
    before = file.read_bytes()
    status, text = called("keys", "new", str(file))
    assert (status, file.read_bytes()) == (1, before)
    assert "embferry keys rotate" in text


def test_rotate_puts_a_new_key_first_and_drops_the_third(tmp_path: Path) -> None:
    file, link = tmp_path / "key", tmp_path / "link"
    called("keys", "new", str(file))
    link.symlink_to(file)
    (first,) = ClusterKeys.of_file(file).accepted()
    assert called("keys", "rotate", str(link))[0] == 0
    second, kept = ClusterKeys.of_file(file).accepted()
    assert kept == first
    status, text = called("keys", "rotate", str(file))
    assert status == 0
    assert not any(key.written() in text for key in (first, second))
    third, kept = ClusterKeys.of_file(file).accepted()
    assert kept == second
    assert len({first, second, third}) == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert link.is_symlink()


def test_rotate_needs_a_key_file(tmp_path: Path) -> None:
    status, text = called("keys", "rotate", str(tmp_path / "absent"))
    assert status == 1
    assert "cannot be read" in text
    assert f"embferry keys new {tmp_path / 'absent'}" in text


@pytest.mark.parametrize("words", [("router",), ("serve",)])
def test_a_router_for_strangers_needs_an_api_key(words: tuple[str, ...]) -> None:
    status, text = called(*words, *HOSTS)
    assert status == 2
    (line,) = [line for line in text.splitlines() if line.startswith("embferry: ")]
    assert "EMBFERRY_ROUTER_API_KEY" in line
    assert "--insecure" in line


@pytest.mark.parametrize("verb", ["encode", "language", "bootstrap"])
def test_a_part_that_strangers_can_reach_needs_a_key(verb: str) -> None:
    status, text = called(verb, *HOSTS)
    assert status == 2
    (line,) = [line for line in text.splitlines() if line.startswith("embferry: ")]
    assert "embferry keys new" in line
    assert "--insecure" in line


def test_a_key_file_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    file = tmp_path / "key"
    called("keys", "new", str(file))
    file.chmod(0o644)
    status, text = called("router", "--cluster-key-file", str(file))
    assert status == 2
    assert f"chmod 600 {file}" in text


def test_the_settings_reach_the_environment_that_processes_inherit(tmp_path: Path) -> None:
    file = tmp_path / "key"
    called("keys", "new", str(file))
    called("router", "--host", "192.0.2.1", "--cluster-key-file", str(file), "--insecure", "--port", "1")
    assert os.environ["EMBFERRY_CLUSTER_KEY_FILE"] == str(file)
    assert os.environ["EMBFERRY_INSECURE"] == "1"
    called("router", "--host", "192.0.2.1", "--no-insecure", "--port", "1")
    assert "EMBFERRY_INSECURE" not in os.environ
