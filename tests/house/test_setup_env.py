"""What ``make`` does on a fresh machine, as far as it can be seen without installing."""

from __future__ import annotations

import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import setup_env


def test_a_python_that_is_not_supported_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"This is Python 3\.10; Python 3\.11, 3\.12 or 3\.13 is needed"):
        setup_env.use_supported_python()


def test_another_python_on_the_path_is_taken_instead(monkeypatch):
    taken = []
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    monkeypatch.setattr(sys, "argv", ["scripts/setup_env.py"])
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: "/bin/p312" if name == "python3.12" else None)
    monkeypatch.setattr(setup_env.os, "execv", lambda path, arguments: taken.append((path, arguments)))
    monkeypatch.setattr(setup_env.sys, "exit", lambda text: None)  # execv does not return in earnest
    setup_env.use_supported_python()
    assert taken == [("/bin/p312", ["/bin/p312", "scripts/setup_env.py"])]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``main`` in an empty folder, with nothing done in earnest; what it would have installed."""
    installed = []
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "STAMPS", {tests: tmp_path / str(tests) for tests in (False, True)})
    monkeypatch.setattr(setup_env, "works", lambda: True)
    monkeypatch.setattr(setup_env, "fingerprint", lambda: "as it is")
    monkeypatch.setattr(setup_env, "group_requirements", list)
    monkeypatch.setattr(setup_env, "run", lambda command, hint: installed.append(command[-1].partition("[")[2]))
    monkeypatch.setattr(setup_env, "provide", lambda folder: installed.append("system"))

    def main(*arguments):
        installed.clear()
        monkeypatch.setattr(sys, "argv", ["scripts/setup_env.py", *arguments])
        setup_env.main()
        return installed

    return main


def test_the_engines_are_for_the_tests_and_not_for_the_demo(install):
    assert install() == ["serve]"]
    assert install() == []
    assert install("--tests") == ["serve,mooncake,nixl]", "system"]
    assert install("--tests") == ["system"]
    assert install() == []


def test_one_installation_does_for_both(install):
    assert install("--tests") == ["serve,mooncake,nixl]", "system"]
    assert install() == []


@pytest.mark.parametrize("changed", setup_env.INPUTS)
def test_a_change_of_what_is_asked_for_installs_anew(tmp_path, monkeypatch, changed):
    (tmp_path / "scripts").mkdir()
    for name in setup_env.INPUTS:
        (tmp_path / name).write_text("as it was")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    before = setup_env.fingerprint()
    assert setup_env.fingerprint() == before
    (tmp_path / changed).write_text("otherwise")
    assert setup_env.fingerprint() != before


def test_a_failing_step_shows_its_output_and_what_to_look_at(capfd):
    with pytest.raises(SystemExit, match=r"ended with 3; is it plugged in\?"):
        setup_env.run([sys.executable, "-c", "print('smoke'); raise SystemExit(3)"], "is it plugged in?")
    assert "smoke" in capfd.readouterr().err


def test_every_requirement_has_its_exact_version():
    project = tomllib.loads((setup_env.ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    asked = project["project"]["dependencies"] + [r for extra in extras for r in extra]
    asked += setup_env.group_requirements() + project["build-system"]["requires"]
    lines = (setup_env.ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_normal(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}
    for requirement in map(Requirement, asked):
        if requirement.name != "embferry":
            assert requirement.specifier.contains(pinned[_normal(requirement.name)]), requirement
    assert pinned["torch"] == "2.13.0"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
