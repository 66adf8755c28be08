"""What the tests need of the system: found, fetched, or named. Nothing is installed here."""

from __future__ import annotations

import os
import sys

import pytest

import system_packages
from run_command import Outcome, run_command
from system_packages import Need

COMMAND = Need("no-such-command", "its-package", "it is wanted")
LIBRARY = Need("libnosuch.so.1", "libnosuch1", "it is wanted too")
BOTH = (COMMAND, LIBRARY)


@pytest.fixture
def apt(monkeypatch, tmp_path):
    """apt in name only: what it is asked for, and by whom. ``brings`` is done at each call."""

    class Apt:
        uid = 0

        def __init__(self):
            self.asked = []
            self.brings = lambda command: None

        def __call__(self, command, env, seconds):
            assert seconds > 0
            self.asked.append(" ".join(word for word in command if word in WORDS))
            self.brings(command)
            return Outcome(100, ["E: no network"])

    stand_in = Apt()
    monkeypatch.setattr(system_packages, "run_command", stand_in)
    monkeypatch.setattr(system_packages.os, "geteuid", lambda: stand_in.uid)
    real = system_packages.shutil.which
    monkeypatch.setattr(system_packages.shutil, "which", lambda name: "/a" if name == "apt-get" else real(name))
    return stand_in


WORDS = ("update", "install", "--download-only", COMMAND.package, LIBRARY.package)


def test_what_is_there_is_left_alone(apt, tmp_path, capfd):
    (tmp_path / "libnosuch.so.1").touch()
    system_packages.provide(tmp_path, (LIBRARY, Need("sh", "dash", ""), Need("libc.so.6", "libc6", "")))
    assert apt.asked == []
    assert capfd.readouterr().out == ""


def test_what_cannot_be_had_is_named_with_the_way_out(apt, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        system_packages.provide(tmp_path, BOTH)
    assert "no-such-command: it is wanted" in str(ended.value)
    assert "apt-get install its-package libnosuch1" in str(ended.value)
    assert "E: no network" in capfd.readouterr().err, "the reason"
    assert apt.asked == ["update", "install its-package libnosuch1"], "the indexes there are may do"


def test_without_apt_it_is_named_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(system_packages.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"libnosuch\.so\.1: it is wanted too"):
        system_packages.provide(tmp_path, BOTH)


def test_who_is_not_root_gets_libraries_beside_the_engine_and_the_links_among_them_resolved(apt, tmp_path):
    folder = tmp_path / "venv" / "libs"
    apt.uid = 1000

    def unpack(command):
        if command[0] == "dpkg-deb":
            place = f"{command[-1]}/usr/lib/x86_64-linux-gnu"
            os.makedirs(place)
            with open(f"{place}/libnosuch.so.1.4.2", "w") as file:
                file.write("code")
            os.symlink("libnosuch.so.1.4.2", f"{place}/libnosuch.so.1")
            os.symlink("nowhere", f"{place}/libdangling.so.1")
        elif "--download-only" in command:
            cache = next(word for word in command if word.startswith("Dir::Cache=")).partition("=")[2]
            open(f"{cache}/archives/libnosuch1.deb", "w").close()

    apt.brings = unpack
    system_packages.provide(folder, (LIBRARY,))
    assert (folder / "libnosuch.so.1").read_text() == "code"
    assert not (folder / "libdangling.so.1").is_symlink()
    assert apt.asked == ["update", "install --download-only libnosuch1", ""]


def test_a_command_that_does_not_end_is_ended(capfd):
    outcome = run_command(
        [sys.executable, "-c", "print('begun', flush=True); input(); import time; time.sleep(600)"], {}, 60
    )
    assert outcome.returncode == 1, "there is no input to wait for"
    assert outcome.lines[0] == "begun"
    outcome = run_command([sys.executable, "-c", "import signal; signal.pause()"], {}, 0.2)
    assert outcome.returncode == -9
